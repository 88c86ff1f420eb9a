"""TensorRT and TensorRT-RTX as Python modules: alike in everything that is used here."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import EngineError

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
