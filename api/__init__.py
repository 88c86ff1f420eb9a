"""ppllava-edge: ask videos questions, on the machine where the camera is.

    from ppllava_edge import VideoQA

    qa = VideoQA()                       # the packed demonstration model; VideoQA("path/to/bundle") for a real one
    video = qa.open("clip.mp4")          # decoded and encoded once
    print(video.ask("What color is the circle?").text)

    with qa.live("rtsp://camera/stream", fps=2) as live:   # encoded as it arrives, asked at any moment
        print(live.ask("Is somebody at the door?", wait=10).text)

Importing this package loads nothing heavy; engines and decoders load on first use.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines.errors import BundleError, BusyError, EngineError, MediaError, PPLLaVAError, PromptError
    from .runtime.answer import Answer, AnswerStream, Moment
    from .runtime.feature_cache import FeatureCache
    from .runtime.live import Live
    from .runtime.pipeline import Pipeline
    from .runtime.sampling import Sampling
    from .runtime.session import Video, VideoQA

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the app says otherwise

_WHERE = {
    "VideoQA": "runtime.session", "Video": "runtime.session", "Live": "runtime.live", "Answer": "runtime.answer", "AnswerStream": "runtime.answer",
    "Moment": "runtime.answer", "Sampling": "runtime.sampling", "FeatureCache": "runtime.feature_cache", "Pipeline": "runtime.pipeline",
    "PPLLaVAError": "engines.errors", "BundleError": "engines.errors", "MediaError": "engines.errors", "PromptError": "engines.errors",
    "EngineError": "engines.errors", "BusyError": "engines.errors",
}  # fmt: skip
__all__ = [
    "Answer", "AnswerStream", "BundleError", "BusyError", "EngineError", "FeatureCache", "Live", "MediaError", "Moment", "PPLLaVAError", "Pipeline",
    "PromptError", "Sampling", "Video", "VideoQA",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
