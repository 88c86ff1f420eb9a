"""Plans a TensorRT build for a target: checks its requirements and resolves its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import engine_folder
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.bundle.windows import Triple
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.libraries import installed_version
from ppllava_edge.engines.machine import gpu_facts
from ppllava_edge.engines.targets.profiles import Limits, limits
from ppllava_edge.engines.targets.select import NEWEST_OPERATORS

CAPABILITIES = ("8.6", "8.9", "12.0")  # RTX 30, 40 and 50
PIECE_BYTES = 512 << 20
EMBEDDED_KERNELS = (10, 9)  # TensorRT whose engines can carry a plugin's kernel


@dataclass(frozen=True)
class Options:
    """Options of a TensorRT build.

    Attributes:
        capabilities: Compute capabilities that TensorRT-RTX builds for ahead of time.
        capacity: Positions of the KV cache; None: the model's usual ones.
        frames: Frames of the usual clip; None: the model's default.
        plugin: The form of the pooling plugin: none, python, aot or auto.
        decoder_profiles: 2 (prefill, one token) or 1.
        piece_bytes: Maximum bytes of a decoder's weights in one engine.
        workspace: Maximum bytes of scratch memory; 0: the library's own limit.
        level: TensorRT's optimisation level.
    """

    capabilities: tuple[str, ...] = CAPABILITIES
    capacity: int | None = None
    frames: int | None = None
    plugin: str = "auto"
    decoder_profiles: int = 2
    piece_bytes: int = PIECE_BYTES
    workspace: int = 0
    level: int = 3


@dataclass(frozen=True)
class Plan:
    """A build, with everything that follows from its options and the machine.

    Attributes:
        bundle: The bundle with the graphs.
        target: rtx, orin or orin-jp6.
        library: "tensorrt" or "tensorrt_rtx".
        version: Its version.
        size: Frames, prompt and KV cache that engines are built for.
        options: The build's options.
        plugin: none, python or aot.
        staging: The folder that keeps finished engines until all are built; a later build resumes from it.
        details: Details for the engine's manifest.
    """

    bundle: Bundle
    target: str
    library: str
    version: str
    size: Limits
    options: Options
    plugin: str
    staging: Path
    details: dict[str, Any]

    @property
    def windows(self) -> tuple[Triple, Triple]:
        """Kernel and stride of the plugin: those of the usual clip."""
        return _windows(self.bundle.manifest, self.size)


def make_plan(bundle: Bundle, target: str, options: Options) -> Plan:
    """Decide everything about a build.

    Raises:
        EngineError: If the target can't be built here.
    """
    library = "tensorrt_rtx" if target == "rtx" else "tensorrt"
    version = installed_version(library)
    m = bundle.manifest
    check_possible(m, target, library, version)
    size = limits(m, options.capacity, options.frames, options.decoder_profiles)
    plugin = plugin_form(options.plugin, target, library) if m.pooling.windowed else "none"
    details: dict[str, Any] = {
        "capacity": size.capacity,
        "frames": list(size.frames),
        "plugin": plugin,
        "decoder_profiles": size.decoder_profiles,
    }
    details |= {"capabilities": list(options.capabilities)} if target == "rtx" else _this_gpu()
    if plugin != "none":
        kernel, stride = _windows(m, size)
        details |= {"kernel": list(kernel), "stride": list(stride)}
    staging = engine_folder(bundle.path, f".{target}.building")
    return Plan(bundle, target, library, version, size, options, plugin, staging, details)


def check_possible(m: Manifest, target: str, library: str, version: str) -> None:
    """Refuse what can't work, before anything is built.

    Args:
        m: The bundle's manifest.
        target: rtx, orin or orin-jp6.
        library: "tensorrt" or "tensorrt_rtx".
        version: Its installed version; "": not installed.

    Raises:
        EngineError: If the library is missing or too old, or can't run the model.
    """
    if not version:
        extra = "rtx" if library == "tensorrt_rtx" else "tensorrt"
        jetson = "on a Jetson it is part of JetPack; elsewhere: " if library == "tensorrt" else ""
        raise EngineError(
            f"--target {target} needs {library}, which is not installed: "
            f"{jetson}pip install 'ppllava-edge[{extra}]'"
        )
    if m.decoder.kv_dtype == "float32":
        raise EngineError(
            f"{m.name} computes in float32, for which TensorRT has no attention with a KV cache; "
            f"export it with --precision fp16, int8 or int4"
        )
    if m.decoder.kv_dtype == "int8":
        raise EngineError(f"{m.name} has an INT8 KV cache, which TensorRT refuses; export it without kv=int8")
    if target == "orin" and _version_tuple(version) < NEWEST_OPERATORS:
        raise EngineError(
            f"--target orin needs TensorRT 10.15 or later, not {version}; use --target orin-jp6"
        )


def plugin_form(wanted: str, target: str, library: str) -> str:
    """The form of the pooling plugin: the engine carries the kernel where TensorRT can, else Python runs it.

    Args:
        wanted: none, python, aot or auto.
        target: rtx, orin or orin-jp6.
        library: "tensorrt" or "tensorrt_rtx".

    Returns:
        none, python or aot.

    Raises:
        EngineError: If TensorRT-RTX is asked to carry the kernel.
    """
    if wanted == "aot" and target == "rtx":
        raise EngineError(
            "TensorRT-RTX engines can't carry a kernel of their own: use --plugin python, or none"
        )
    if wanted != "auto":
        return wanted
    if target == "rtx":
        return "python"
    return "aot" if _version_tuple(installed_version(library)) >= EMBEDDED_KERNELS else "python"


def _version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _windows(m: Manifest, size: Limits) -> tuple[Triple, Triple]:
    frames = max(size.frames[1], m.pooling.video.min_frames())
    _, kernel, stride = m.pooling.video.resolve((frames, *m.vision.grid))
    return kernel, stride


def _this_gpu() -> dict[str, Any]:
    """Compute capability and name of the GPU that full TensorRT builds for."""
    present = gpu_facts.gpus()
    if not present:
        raise EngineError(
            "full TensorRT builds on the GPU that it builds for, and none was found here; "
            "ppllava-doctor says what is missing"
        )
    return {"capabilities": [present[0].capability], "device": present[0].name}
