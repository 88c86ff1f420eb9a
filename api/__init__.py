"""ppllava-edge: ask videos questions, on the machine where the camera is.

    from ppllava_edge import VideoQA

    qa = VideoQA()                       # the packed demonstration model; VideoQA("path/to/bundle") for a real one
    video = qa.open("clip.mp4")          # decoded and encoded once
    print(video.ask("What color is the circle?").text)

Importing this package loads nothing heavy; engines and decoders load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines.errors import BundleError, EngineError, MediaError, PPLLaVAError, PromptError
    from .runtime.pipeline import Pipeline
    from .runtime.session import Answer, Video, VideoQA

_WHERE = {
    "VideoQA": "runtime.session", "Video": "runtime.session", "Answer": "runtime.session", "Pipeline": "runtime.pipeline",
    "PPLLaVAError": "engines.errors", "BundleError": "engines.errors", "MediaError": "engines.errors", "PromptError": "engines.errors",
    "EngineError": "engines.errors",
}  # fmt: skip
__all__ = ["Answer", "BundleError", "EngineError", "MediaError", "PPLLaVAError", "Pipeline", "PromptError", "Video", "VideoQA"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
