"""The lean runtime: from a video and a question to an answer. Imports neither torch nor transformers nor the exporter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answer import Answer, AnswerStream, Moment
    from .feature_cache import FeatureCache
    from .live import Live
    from .pipeline import Pipeline
    from .session import Video, VideoQA

_WHERE = {
    "Pipeline": "pipeline", "VideoQA": "session", "Video": "session", "Answer": "answer", "AnswerStream": "answer", "Moment": "answer",
    "FeatureCache": "feature_cache", "Live": "live",
}  # fmt: skip
__all__ = ["Answer", "AnswerStream", "FeatureCache", "Live", "Moment", "Pipeline", "Video", "VideoQA"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
