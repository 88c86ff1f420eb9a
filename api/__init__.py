"""ppllava-edge: ask videos questions, on the machine where the camera is.

    from ppllava_edge import VideoQA

    qa = VideoQA()                       # the packed demonstration model; VideoQA("bundle") for a real one
    video = qa.open("clip.mp4")          # decoded and encoded once
    print(video.ask("What color is the circle?").text)

    with qa.live("rtsp://camera/stream", fps=2) as live:   # encoded as it arrives, asked at any moment
        print(live.ask("Is somebody at the door?", wait=10).text)

Importing this package loads nothing heavy; engines and decoders load on first use.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ppllava_edge import runtime as _runtime
from ppllava_edge.engines.errors import (
    BundleError,
    BusyError,
    EngineError,
    MediaError,
    PPLLaVAError,
    PromptError,
)

if TYPE_CHECKING:
    from ppllava_edge.runtime import (
        Answer,
        AnswerStream,
        AsyncAnswerStream,
        FeatureCache,
        Live,
        MediaLimits,
        Memory,
        Moment,
        Pipeline,
        Sampling,
        Video,
        VideoQA,
    )

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the app says otherwise

__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "BundleError",
    "BusyError",
    "EngineError",
    "FeatureCache",
    "Live",
    "MediaError",
    "MediaLimits",
    "Memory",
    "Moment",
    "PPLLaVAError",
    "Pipeline",
    "PromptError",
    "Sampling",
    "Video",
    "VideoQA",
]


def __getattr__(name: str) -> Any:
    if name in _runtime.__all__:
        return getattr(_runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
