"""Which engine of a bundle runs here."""

from __future__ import annotations

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import Engine, find_engine
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.libraries import import_onnxruntime

TARGETS = ("cpu", "cuda", "lowered", "rtx", "orin", "orin-jp6")
FAMILIES = {"onnxruntime": ("cuda", "cpu", "lowered"), "tensorrt": ("orin", "orin-jp6"), "rtx": ("rtx",)}
ON_CPU = ("cpu", "lowered")
FASTEST_FIRST = ("orin", "rtx", "orin-jp6", "cuda")  # on a GPU
MIN_ONNXRUNTIME = (1, 24)  # that knows opset 24
NEWEST_OPERATORS = (10, 15)  # TensorRT from which on the standard graph's attention, cache and norms exist


def select(bundle: Bundle, device: str, wanted: str = "auto") -> tuple[Engine | None, str]:
    """The engine that runs a bundle on a device (cpu or cuda), or None for its standard graphs, and why one that is there is not used.

    wanted: auto, a family (onnxruntime, tensorrt, rtx), a target, or standard. Raises EngineError if what was asked for by name can't run.
    """
    if wanted == "standard":
        return None, ""
    check_name(wanted)
    candidates = _candidates(device, wanted)
    if not candidates:
        other = "cuda" if device == "cpu" else "cpu"
        raise EngineError(f"--engine {wanted} doesn't run on the {device}; use --device {other}")
    notes = list[str]()
    for target in candidates:
        engine, why = find_engine(bundle, target)
        if engine is not None:
            why = _unfit(engine) if device == "cuda" else ""
            if not why:
                return engine, "; ".join(notes)
        if why:
            notes.append(why)
    if wanted in ("auto", "onnxruntime"):
        return None, "; ".join(notes)
    missing = f"{bundle.path} has no engine for {wanted}; build it: ppllava-build {bundle.path} --target {candidates[0]}"
    raise EngineError("; ".join(notes) or missing)


def check_name(wanted: str) -> None:
    """Raise EngineError for a name that isn't auto, a family, a target or standard."""
    if wanted not in ("auto", "standard", *FAMILIES, *TARGETS):
        raise EngineError(
            f"engine {wanted!r} is unknown; choose auto, {', '.join(FAMILIES)}, standard or a target ({', '.join(TARGETS)})"
        )


def _candidates(device: str, wanted: str) -> list[str]:
    here = FASTEST_FIRST if device == "cuda" else ON_CPU
    if wanted in TARGETS:
        return [wanted] if wanted in here else []
    found = [target for target in here if wanted == "auto" or target in FAMILIES[wanted]]
    if device == "cpu" and not _is_old():
        found = [target for target in found if target != "lowered"]
    return found


def _is_old() -> bool:
    """Whether this ONNX Runtime doesn't know the standard graphs' opset."""
    version = str(import_onnxruntime().__version__).split(".")
    return (int(version[0]), int(version[1])) < MIN_ONNXRUNTIME


def _unfit(engine: Engine) -> str:
    """Why an engine doesn't run on this machine's GPU, "" if it does."""
    from ppllava_edge.engines.machine.gpu_facts import gpus

    built_for, found = engine.details.get("capabilities", []), gpus()
    if not built_for or not found:
        return ""
    here = found[0]
    rebuild = f"rebuild it: ppllava-build {engine.folder.parent.parent} --target {engine.target} --force"
    if here.capability not in built_for:
        return f"{engine.folder} was built for compute capability {', '.join(built_for)}, this GPU ({here.name}) has {here.capability}; {rebuild}"
    device = engine.details.get("device")
    if device and device != here.name:
        return f"{engine.folder} was built on {device}, this is {here.name}; {rebuild}"
    return ""
