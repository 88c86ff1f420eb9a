"""The lean runtime: from a video and a question to an answer. Imports neither torch nor transformers nor the exporter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .session import Answer, Video, VideoQA

_WHERE = {"Pipeline": "pipeline", "VideoQA": "session", "Video": "session", "Answer": "session"}
__all__ = ["Answer", "Pipeline", "Video", "VideoQA"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
