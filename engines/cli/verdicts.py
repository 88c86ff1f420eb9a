"""Which targets of ppllava-build can be built and run on a machine, and how to install what is missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ppllava_edge.engines.libraries import installed_version
from ppllava_edge.engines.machine.gpu_facts import Gpu
from ppllava_edge.engines.machine.inventory import Machine
from ppllava_edge.engines.targets.select import MIN_ONNXRUNTIME, NEWEST_OPERATORS, ON_CPU, TARGETS

MIN_CAPABILITY = (7, 5)


@dataclass(frozen=True)
class Need:
    """One thing that a target lacks.

    Attributes:
        name: What is missing, in a word or two.
        remedy: What to do, in one line.
        extra: The extra of ppllava-edge that installs it; "" if pip can't help.
        helps_without_gpu: Whether installing it helps on a machine without a GPU.
        final: Whether the target can't work on this machine whatever is installed.
    """

    name: str
    remedy: str
    extra: str = ""
    helps_without_gpu: bool = False
    final: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether a target can be built and run, and what it lacks."""

    target: str
    builds: bool
    runs: bool
    needs: tuple[Need, ...]

    @property
    def missing(self) -> str:
        """How to get everything that is missing, in one line; "" if nothing is."""
        return "; ".join(need.remedy for need in self.needs)


@dataclass(frozen=True)
class Installation:
    """Commands to paste.

    Attributes:
        targets: The targets that they enable.
        after: What they require first; "" if nothing.
        commands: Shell commands, in order.
    """

    targets: tuple[str, ...]
    after: str
    commands: tuple[str, ...]


NO_ONNX = Need("onnx", "to build: pip install 'ppllava-edge[export]'", "export", helps_without_gpu=True)
NO_ONNXRUNTIME = Need("onnxruntime", "pip install 'ppllava-edge[cpu]'", "cpu", helps_without_gpu=True)
NO_CUDA_PROVIDER = Need(
    "onnxruntime-gpu", "pip uninstall onnxruntime, then pip install 'ppllava-edge[cuda]'", "cuda"
)
NO_RTX = Need("tensorrt-rtx", "pip install 'ppllava-edge[rtx]'", "rtx", helps_without_gpu=True)
NO_DRIVER = Need("NVIDIA driver", "no NVIDIA driver")
NO_GPU = Need("GPU that the driver supports", "no GPU that the driver supports")


def judge(machine: Machine) -> list[Verdict]:
    """Compare what each target needs with what a machine has."""
    return [_verdict(target, machine) for target in TARGETS]


def installations(machine: Machine, verdicts: Sequence[Verdict]) -> list[Installation]:
    """Group what targets lack into as few commands as possible.

    Args:
        machine: The machine.
        verdicts: Its targets, from judge().

    Returns:
        Installations that help at once, then those that need a GPU first. Targets that can't work here are
        left out.
    """
    now: dict[str, list[str]] = {}  # extra → targets
    later: dict[str, list[str]] = {}
    for verdict in verdicts:
        if any(need.final for need in verdict.needs):
            continue
        for need in verdict.needs:
            if need.extra:
                group = now if machine.gpus or need.helps_without_gpu else later
                group.setdefault(need.extra, []).append(verdict.target)
    later = {extra: targets for extra, targets in later.items() if extra not in now}
    replaced = "onnxruntime" in machine.packages and "onnxruntime-gpu" not in machine.packages
    return [
        *_installation(now, "", replaced),
        *_installation(later, _article(_no_gpu(machine).name), replaced or "cpu" in now),
    ]


def _installation(extras: dict[str, list[str]], after: str, has_onnxruntime: bool) -> list[Installation]:
    """At most one installation. onnxruntime and onnxruntime-gpu can't be installed side by side."""
    if not extras:
        return []
    commands = []
    if "cuda" in extras and has_onnxruntime:
        commands.append("pip uninstall -y onnxruntime")
    names = sorted(extra for extra in extras if extra != "cpu" or "cuda" not in extras)
    commands.append(f"pip install 'ppllava-edge[{','.join(names)}]'")
    helped = {target for targets in extras.values() for target in targets}
    return [Installation(tuple(t for t in TARGETS if t in helped), after, tuple(commands))]


def _verdict(target: str, m: Machine) -> Verdict:
    if target in ON_CPU:
        return _on_cpu(target, m)
    needs = [] if "onnx" in m.packages else [NO_ONNX]
    if not m.gpus:
        needs.append(_no_gpu(m))
    if "cuda-core" not in m.packages:
        extra = "jetson" if m.jetpack else {"cuda": "cuda", "rtx": "rtx"}.get(target, "tensorrt")
        needs.append(Need("cuda-core", f"pip install 'ppllava-edge[{extra}]' (cuda-core)", extra))
    if target == "cuda":
        return _with_onnxruntime_cuda(m, needs)
    return _with_tensorrt(target, m, needs)


def _on_cpu(target: str, m: Machine) -> Verdict:
    needs = [] if "onnx" in m.packages else [NO_ONNX]
    version = m.packages.get("onnxruntime") or m.packages.get("onnxruntime-gpu")
    too_old = version is not None and _version(version) < MIN_ONNXRUNTIME and target == "cpu"
    if version is None:
        needs.append(NO_ONNXRUNTIME)
    elif too_old:
        remedy = f"ONNX Runtime {version} is older than 1.24 (it needs Python 3.11): use the target lowered"
        needs.append(Need("ONNX Runtime 1.24 (use lowered)", remedy, final=True))
    return Verdict(target, "onnx" in m.packages, version is not None and not too_old, tuple(needs))


def _with_onnxruntime_cuda(m: Machine, needs: list[Need]) -> Verdict:
    if "onnxruntime-gpu" not in m.packages:
        needs.append(NO_CUDA_PROVIDER)
    runs = bool(m.gpus) and {"cuda-core", "onnxruntime-gpu"} <= set(m.packages)
    return Verdict("cuda", "onnx" in m.packages, runs, tuple(needs))


def _with_tensorrt(target: str, m: Machine, needs: list[Need]) -> Verdict:
    version = installed_version("tensorrt_rtx" if target == "rtx" else "tensorrt")
    if not version:
        needs.append(NO_RTX if target == "rtx" else _no_tensorrt(m))
    if target == "orin" and version and _version(version) < NEWEST_OPERATORS:
        remedy = f"TensorRT {version} is older than 10.15: use orin-jp6"
        needs.append(Need("TensorRT 10.15 (use orin-jp6)", remedy, final=True))
        version = ""
    problem = _gpu_problem(target, m.gpus[0]) if m.gpus else None
    if problem is not None:
        needs.append(problem)
    usable_gpu = bool(m.gpus) and problem is None
    builds = "onnx" in m.packages and bool(version) and (target == "rtx" or bool(m.gpus))
    runs = usable_gpu and bool(version) and "cuda-core" in m.packages
    return Verdict(target, builds, runs, tuple(needs))


def _gpu_problem(target: str, gpu: Gpu) -> Need | None:
    """Why a target can't run on a GPU."""
    if _version(gpu.capability) < MIN_CAPABILITY:
        remedy = f"{gpu.name} has compute capability {gpu.capability}; the minimum is 7.5"
        return Need("compute capability 7.5", remedy, final=True)
    if target == "rtx" and gpu.integrated:
        remedy = "TensorRT-RTX is for desktop cards: use orin or orin-jp6"
        return Need("desktop card (use orin or orin-jp6)", remedy, final=True)
    return None


def _no_gpu(m: Machine) -> Need:
    return NO_DRIVER if m.cuda is None and m.driver is None else NO_GPU


def _article(name: str) -> str:
    return f"{'an' if name.startswith('NVIDIA') else 'a'} {name}"


def _no_tensorrt(m: Machine) -> Need:
    remedy = "TensorRT (part of JetPack; elsewhere pip install tensorrt)"
    return Need("TensorRT", remedy, "" if m.jetpack else "tensorrt")


def _version(text: str) -> tuple[int, int]:
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return numbers[0], numbers[1] if len(numbers) > 1 else 0
