"""ppllava-doctor: what this machine has, which engines can be built and run here, and what is missing for the others."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.libraries import installed_version
from ppllava_edge.engines.machine.gpu_facts import Gpu, driver_version, gpus, load_driver
from ppllava_edge.engines.machine.memory import system_memory
from ppllava_edge.engines.targets.select import MIN_ONNXRUNTIME, NEWEST_OPERATORS, TARGETS
from ppllava_edge.engines.terminal import Command, human_bytes, table

PACKAGES = (
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-core",
    "av",
    "tokenizers",
)
ROOT = Path("/")


@dataclass(frozen=True)
class Machine:
    """memory, available: bytes, None: unknown. free_blocks: the largest free blocks of physical memory, how many and of how many bytes (as
    tegrastats' lfb; few of them, and a Jetson can't give the GPU much in one piece). cuda: the newest that the driver runs."""

    system: str
    python: str
    cores: int
    memory: int | None
    available: int | None
    free_blocks: tuple[int, int] | None
    gpus: list[Gpu]
    cuda: str | None
    driver: str | None
    jetpack: str | None
    power_mode: str | None
    packages: dict[str, str]


@dataclass(frozen=True)
class Verdict:
    """Of one target. missing: what to do, "" where nothing is."""

    target: str
    builds: bool
    runs: bool
    missing: str


def look(root: Path = ROOT) -> Machine:
    """Everything that can be known without loading a GPU library. root: of the file system (tests)."""
    driver = load_driver()
    memory = system_memory(root)
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        f"{platform.system()} {platform.release()}, {platform.machine()}",
        platform.python_version(),
        os.cpu_count() or 1,
        memory.get("MemTotal"),
        memory.get("MemAvailable"),
        free_blocks(root),
        gpus(driver),
        driver_version(driver) if driver is not None else None,
        _kernel_driver(root),
        jetpack(root),
        _power_mode(),
        packages,
    )


def judge(machine: Machine) -> list[Verdict]:
    """What each target needs, against what is here."""
    return [Verdict(target, *_verdict(target, machine)) for target in TARGETS]


def _verdict(target: str, m: Machine) -> tuple[bool, bool, str]:
    has, gpu = m.packages, m.gpus[0] if m.gpus else None
    missing = [] if "onnx" in has else ["to build: pip install 'ppllava-edge[export]'"]
    can_build = "onnx" in has
    if target in ("cpu", "lowered"):
        version = has.get("onnxruntime") or has.get("onnxruntime-gpu")
        new = version is not None and _version(version) >= MIN_ONNXRUNTIME
        if version is None:
            missing.append("pip install 'ppllava-edge[cpu]'")
        elif target == "cpu" and not new:
            missing.append(
                f"ONNX Runtime {version} is older than 1.24 (it needs Python 3.11): use the target lowered"
            )
        return can_build, new if target == "cpu" else version is not None, "; ".join(missing)
    if gpu is None:
        missing.append(
            "no NVIDIA driver" if m.cuda is None and m.driver is None else "no GPU that the driver runs"
        )
    if "cuda-core" not in has:
        extra = "jetson" if m.jetpack else {"cuda": "cuda", "rtx": "rtx"}.get(target, "tensorrt")
        missing.append(f"pip install 'ppllava-edge[{extra}]' (cuda-core)")
    if target == "cuda":
        if "onnxruntime-gpu" not in has:
            missing.append("pip uninstall onnxruntime, then pip install 'ppllava-edge[cuda]'")
        return can_build, gpu is not None and {"cuda-core", "onnxruntime-gpu"} <= set(has), "; ".join(missing)
    library = "tensorrt_rtx" if target == "rtx" else "tensorrt"
    version = installed_version(library)
    if not version:
        missing.append(
            "pip install 'ppllava-edge[rtx]'"
            if target == "rtx"
            else "TensorRT (part of JetPack; elsewhere pip install tensorrt)"
        )
    if target == "orin" and version and _version(version) < NEWEST_OPERATORS:
        missing.append(f"TensorRT {version} is older than 10.15: use orin-jp6")
        version = ""
    fits = gpu is not None and _fits(target, gpu, missing)
    runs = fits and bool(version) and "cuda-core" in has
    return can_build and bool(version) and (target == "rtx" or gpu is not None), runs, "; ".join(missing)


def _fits(target: str, gpu: Gpu, missing: list[str]) -> bool:
    least = (7, 5)
    if _version(gpu.capability) < least:
        missing.append(f"{gpu.name} has compute capability {gpu.capability}; 7.5 is the least")
        return False
    if target == "rtx" and gpu.integrated:
        missing.append("TensorRT-RTX is for desktop cards: use orin or orin-jp6")
        return False
    return True


def _version(text: str) -> tuple[int, int]:
    numbers = re.findall(r"\d+", text)
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0


# -- the machine ---------------------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def free_blocks(root: Path = ROOT) -> tuple[int, int] | None:
    """How many of the largest free blocks of physical memory there are, and their bytes: Linux's buddy allocator, in powers of two pages."""
    counts: dict[int, int] = {}
    for line in _read(root / "proc/buddyinfo").splitlines():
        for order, count in enumerate(int(n) for n in re.findall(r"\s(\d+)", line.partition("zone")[2])):
            counts[order] = counts.get(order, 0) + count
    orders = [order for order, count in counts.items() if count]
    return (counts[max(orders)], 4096 << max(orders)) if orders else None


def _kernel_driver(root: Path) -> str | None:
    found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", _read(root / "proc/driver/nvidia/version"))
    return found[1] if found else None


def jetpack(root: Path = ROOT) -> str | None:
    """ "6.2 (L4T 36.4.3)", from what a Jetson's system says of itself; None elsewhere."""
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release"))
    package = re.search(
        r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: ([\d.]+)", _read(root / "var/lib/dpkg/status"), re.M
    )
    linux = f"L4T {release[1]}.{release[2]}" if release else ""
    if package:
        return f"{package[1]} ({linux})" if linux else package[1]
    return linux or None


def _power_mode() -> str | None:
    """A Jetson's, as nvpmodel says it."""
    command = shutil.which("nvpmodel")
    if command is None:
        return None
    try:
        run = subprocess.run([command, "-q"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"Power Mode:\s*(\S+)", run.stdout)
    return found[1] if found else None


def _rows(m: Machine) -> list[tuple[str, str]]:
    rows = [("system", m.system), ("Python", m.python), ("cores", str(m.cores))]
    if m.memory:
        rows.append(("memory", f"{human_bytes(m.memory)}, {human_bytes(m.available or 0)} available"))
    if m.free_blocks:
        rows.append(("largest free blocks", f"{m.free_blocks[0]} of {human_bytes(m.free_blocks[1])}"))
    if m.jetpack:
        rows.append(("JetPack", m.jetpack))
    if m.power_mode:
        rows.append(("power mode", m.power_mode))
    for gpu in m.gpus:
        free = f", {human_bytes(gpu.free)} free" if gpu.free is not None else ""
        shared = ", shared with the system" if gpu.integrated else ""
        rows.append(
            (
                "GPU",
                f"{gpu.name}, compute capability {gpu.capability}, {gpu.processors} processors, {human_bytes(gpu.memory)}{free}{shared}",
            )
        )
    if not m.gpus:
        rows.append(("GPU", "none"))
    rows.append(
        ("NVIDIA driver", (m.driver or "here") + f", CUDA up to {m.cuda}" if m.cuda else m.driver or "none")
    )
    return rows + [(name, version) for name, version in m.packages.items()]


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(as_json: bool) -> None:
    """Say what this machine has, which targets of ppllava-build can be built and run here, and what is missing for the others.

    Exit status 1 if nothing can run here at all.
    """
    machine = look()
    try:
        verdicts = judge(machine)
    except EngineError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        told: dict[str, Any] = {"machine": asdict(machine), "targets": [asdict(v) for v in verdicts]}
        click.echo(json.dumps(told))
    else:
        table("this machine", ("what", "value"), _rows(machine))
        rows = [
            (v.target, "yes" if v.builds else "no", "yes" if v.runs else "no", v.missing or "nothing")
            for v in verdicts
        ]
        table("targets of ppllava-build", ("target", "builds here", "runs here", "missing"), rows)
    sys.exit(0 if any(v.runs for v in verdicts) else 1)


if __name__ == "__main__":
    main()
