"""Choose the engine of a bundle that runs on this machine."""

from __future__ import annotations

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import Engine, find_engine
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.libraries import import_onnxruntime
from ppllava_edge.engines.machine import gpu_facts

TARGETS = ("cpu", "cuda", "lowered", "rtx", "orin", "orin-jp6")
FAMILIES = {"onnxruntime": ("cuda", "cpu", "lowered"), "tensorrt": ("orin", "orin-jp6"), "rtx": ("rtx",)}
ON_CPU = ("cpu", "lowered")
FASTEST_FIRST = ("orin", "rtx", "orin-jp6", "cuda")  # on a GPU
MIN_ONNXRUNTIME = (1, 24)  # with opset 24
NEWEST_OPERATORS = (10, 15)  # TensorRT with the standard graph's attention, KV cache and norm operators


def select(bundle: Bundle, device: str, wanted: str = "auto") -> tuple[Engine | None, str]:
    """Choose the engine for a bundle on a device.

    Args:
        bundle: The opened bundle.
        device: "cpu" or "cuda".
        wanted: "auto", a family (onnxruntime, tensorrt, rtx), a target, or "standard".

    Returns:
        The engine, or None for the bundle's standard graphs; and why existing engines are not used, or "".

    Raises:
        EngineError: If `wanted` is unknown, or names an engine that can't run here.
    """
    if wanted == "standard":
        return None, ""
    check_name(wanted)
    candidates = _candidates(device, wanted)
    if not candidates:
        other = "cuda" if device == "cpu" else "cpu"
        raise EngineError(f"engine={wanted} doesn't run on the {device}; use device={other}")
    notes: list[str] = []
    for target in candidates:
        engine, reason = find_engine(bundle, target)
        if engine is not None:
            reason = _misfit(engine) if device == "cuda" else ""
            if not reason:
                return engine, "; ".join(notes)
        if reason:
            notes.append(reason)
    if wanted in ("auto", "onnxruntime"):
        return None, "; ".join(notes)
    command = f"ppllava-build {bundle.path} --target {candidates[0]}"
    raise EngineError("; ".join(notes) or f"{bundle.path} has no engine for {wanted}; build it: {command}")


def check_name(wanted: str) -> None:
    """Check the name of an engine.

    Raises:
        EngineError: If it isn't auto, a family, a target or standard.
    """
    if wanted not in ("auto", "standard", *FAMILIES, *TARGETS):
        raise EngineError(
            f"engine {wanted!r} is unknown; "
            f"choose auto, {', '.join(FAMILIES)}, standard or a target ({', '.join(TARGETS)})"
        )


def _candidates(device: str, wanted: str) -> list[str]:
    """Targets that could run on the device, the fastest first."""
    on_device = FASTEST_FIRST if device == "cuda" else ON_CPU
    if wanted in TARGETS:
        return [wanted] if wanted in on_device else []
    targets = [target for target in on_device if wanted == "auto" or target in FAMILIES[wanted]]
    if device == "cpu" and not _needs_lowered_graphs():
        targets = [target for target in targets if target != "lowered"]
    return targets


def _needs_lowered_graphs() -> bool:
    """Whether this ONNX Runtime is older than the standard graphs' opset."""
    version = str(import_onnxruntime().__version__).split(".")
    return (int(version[0]), int(version[1])) < MIN_ONNXRUNTIME


def _misfit(engine: Engine) -> str:
    """Why an engine doesn't run on this machine's GPU; "" if it does."""
    capabilities = engine.details.get("capabilities", [])
    present = gpu_facts.gpus()
    if not capabilities or not present:
        return ""
    gpu = present[0]
    rebuild = f"rebuild it: ppllava-build {engine.folder.parent.parent} --target {engine.target} --force"
    if gpu.capability not in capabilities:
        return (
            f"{engine.folder} was built for compute capability {', '.join(capabilities)}, "
            f"this GPU ({gpu.name}) has {gpu.capability}; {rebuild}"
        )
    device = engine.details.get("device")
    if device and device != gpu.name:
        return f"{engine.folder} was built on {device}, this is {gpu.name}; {rebuild}"
    return ""
