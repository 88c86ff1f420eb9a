"""The lean runtime: from a video and a question to an answer. Imports neither torch nor the exporter.

Subpackages, each of which may import those after it: cli, live, session, encoding, pipeline, decoding,
language, vision, media. All may import lazy.py. batch.py and
video_qa.py, which applications use, sit between cli and live.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppllava_edge.runtime.language.sampling import Sampling
    from ppllava_edge.runtime.live.view import Live
    from ppllava_edge.runtime.media.limits import MediaLimits
    from ppllava_edge.runtime.pipeline.factory import Pipeline
    from ppllava_edge.runtime.pipeline.memory import Memory
    from ppllava_edge.runtime.session.answer import Answer, Moment
    from ppllava_edge.runtime.session.answer_stream import AnswerStream
    from ppllava_edge.runtime.session.asynchronous import AsyncAnswerStream
    from ppllava_edge.runtime.session.video import Video
    from ppllava_edge.runtime.video_qa import VideoQA
    from ppllava_edge.runtime.vision.feature_cache import FeatureCache

_WHERE = {  # loaded on first use: importing this package loads no engine
    "Answer": "session.answer",
    "AnswerStream": "session.answer_stream",
    "AsyncAnswerStream": "session.asynchronous",
    "FeatureCache": "vision.feature_cache",
    "Live": "live.view",
    "MediaLimits": "media.limits",
    "Memory": "pipeline.memory",
    "Moment": "session.answer",
    "Pipeline": "pipeline.factory",
    "Sampling": "language.sampling",
    "Video": "session.video",
    "VideoQA": "video_qa",
}
__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "FeatureCache",
    "Live",
    "MediaLimits",
    "Memory",
    "Moment",
    "Pipeline",
    "Sampling",
    "Video",
    "VideoQA",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
