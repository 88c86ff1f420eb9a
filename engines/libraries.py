"""TensorRT and TensorRT-RTX as Python modules: alike in everything that is used here."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from ppllava_edge.engines.errors import EngineError

EXTRA = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}


def import_library(name: str) -> Any:
    """tensorrt or tensorrt_rtx, or one line that names the extra to install. Raises EngineError."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        title = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}[name]
        raise EngineError(f"{title} is not installed: pip install 'ppllava-edge[{EXTRA[name]}]'") from None


def title(trt: Any) -> str:
    """ "TensorRT 10.16.1" """
    return f"{'TensorRT-RTX' if trt.__name__.endswith('rtx') else 'TensorRT'} {trt.__version__}"


def installed_version(tool: str) -> str:
    """Of a library that opens engines, "" if it isn't here. Doesn't load TensorRT."""
    if tool == "onnxruntime":
        return str(import_onnxruntime().__version__)
    for name in (tool, tool.replace("_", "-"), f"{tool}_cu13", f"{tool}_cu12"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def minor(version: str) -> str:
    """ "1.31.1" → "1.31" """
    return ".".join(version.split(".")[:2])


def import_onnxruntime() -> Any:
    """The library, or one line that names the extra to install. Raises EngineError."""
    try:
        import onnxruntime
    except ImportError:
        raise EngineError(
            "no engine is installed: pip install 'ppllava-edge[cpu]' (or [cuda] for an NVIDIA card)"
        ) from None
    return onnxruntime
