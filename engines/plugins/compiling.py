"""Compile CUDA kernels with NVRTC on the machine that runs them, through cuda-core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppllava_edge.engines.errors import EngineError


def import_cuda_core() -> Any:
    """Import cuda-core.

    Raises:
        EngineError: If it isn't installed; names the extra to install.
    """
    try:
        from cuda import core
    except ImportError:
        raise EngineError("CUDA kernels need cuda-core: pip install 'ppllava-edge[cuda]'") from None
    return core


def open_device(core: Any, device: Any = None) -> tuple[Any, tuple[int, int]]:
    """Make a device current.

    Args:
        core: The module cuda.core.
        device: A cuda-core device; None: the default one.

    Returns:
        The device and its compute capability.

    Raises:
        EngineError: If there is no usable device.
    """
    try:
        device = device or core.Device()
        device.set_current()
        major, minor = device.compute_capability
    except Exception as error:
        raise EngineError(f"no usable CUDA device: {one_line(error)}") from None
    return device, (int(major), int(minor))


def compile_source(
    core: Any, source: str, capability: tuple[int, int], names: Sequence[str], what: str, form: str = "cubin"
) -> Any:
    """Compile kernels for one compute capability. Needs no GPU.

    Args:
        core: The module cuda.core.
        source: CUDA C++ without includes of project headers.
        capability: Major and minor.
        names: The kernels' names.
        what: Names the kernels in the error.
        form: "cubin" or "ptx".

    Returns:
        A cuda-core ObjectCode.

    Raises:
        EngineError: If the compiler refuses the source.
    """
    options = core.ProgramOptions(std="c++17", arch=f"sm_{capability[0]}{capability[1]}")
    try:
        return core.Program(source, "c++", options).compile(form, name_expressions=tuple(names))
    except Exception as error:
        raise EngineError(
            f"{what} can't be compiled for {capability[0]}.{capability[1]}: {one_line(error, 300)}"
        ) from None


def one_line(error: Exception, limit: int = 200) -> str:
    """An exception's text on one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]
