"""The libraries that open engines, ONNX Runtime and TensorRT: importing them, and their versions."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from ppllava_edge.engines.errors import EngineError

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}  # pip extras that install the library


def import_library(name: str) -> Any:
    """Import TensorRT or TensorRT-RTX; the calls used here are the same in both.

    Args:
        name: "tensorrt" or "tensorrt_rtx".

    Raises:
        EngineError: It isn't installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        raise EngineError(
            f"{TITLES[name]} is not installed: pip install 'ppllava-edge[{EXTRAS[name]}]'"
        ) from None


def import_onnxruntime() -> Any:
    """Import ONNX Runtime.

    Raises:
        EngineError: It isn't installed; the message names the extra to install.
    """
    try:
        import onnxruntime
    except ImportError:
        raise EngineError(
            "no engine is installed: pip install 'ppllava-edge[cpu]' (or [cuda] for an NVIDIA card)"
        ) from None
    return onnxruntime


def installed_version(library: str) -> str:
    """The installed version of a library, or "" if there is none. TensorRT isn't loaded.

    Args:
        library: "onnxruntime", "tensorrt" or "tensorrt_rtx".
    """
    if library == "onnxruntime":
        try:
            return str(import_onnxruntime().__version__)
        except EngineError:
            return ""
    for package in (library, library.replace("_", "-"), f"{library}_cu13", f"{library}_cu12"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return ""


def title(trt: Any) -> str:
    """Name and version of an imported library, like "TensorRT 10.16.1"."""
    name = "tensorrt_rtx" if trt.__name__.endswith("rtx") else "tensorrt"
    return f"{TITLES[name]} {trt.__version__}"


def minor(version: str) -> str:
    """Major and minor version: "1.31.1" → "1.31"."""
    return ".".join(version.split(".")[:2])
