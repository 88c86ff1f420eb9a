"""What all kernels share: cuda-core, the device they run on, and compiling (NVRTC) where they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppllava_edge.engines.errors import EngineError


def open_device(core: Any, device: Any = None) -> tuple[Any, tuple[int, int]]:
    """The current device (or this one), and its compute capability. Raises EngineError if there is none."""
    try:
        device = device or core.Device()
        device.set_current()
        major, minor = device.compute_capability
    except Exception as error:
        raise EngineError(f"no usable CUDA device: {' '.join(str(error).split())[:200]}") from None
    return device, (int(major), int(minor))


def compile_source(
    core: Any, source: str, capability: tuple[int, int], names: Sequence[str], what: str, form: str = "cubin"
) -> Any:
    """Kernels for one compute capability, as cuda-core's ObjectCode. form: cubin or ptx. Needs no GPU. Raises EngineError, which names `what`."""
    options = core.ProgramOptions(std="c++17", arch=f"sm_{capability[0]}{capability[1]}")
    try:
        return core.Program(source, "c++", options).compile(form, name_expressions=tuple(names))
    except Exception as error:
        raise EngineError(
            f"{what} can't be compiled for {capability[0]}.{capability[1]}: {' '.join(str(error).split())[:300]}"
        ) from None
