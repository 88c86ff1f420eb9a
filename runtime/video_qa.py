"""The entry point for applications: a VideoQA opens videos and live views, which answer questions.

A video is decoded and encoded once, when it is opened. Only pooling depends on the question, so every
question after the first costs the question tower, pooling and the decoder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ppllava_edge.engines.bundle.packed import find_bundle
from ppllava_edge.engines.bundle.prompt_template import PromptTemplate
from ppllava_edge.engines.errors import EngineError, MediaError
from ppllava_edge.runtime.encoding.cached_features import CachedFeatures
from ppllava_edge.runtime.encoding.encode_source import checked_source, encode_source, reader_of
from ppllava_edge.runtime.encoding.frame_encoder import Progress
from ppllava_edge.runtime.language.numbers import integer
from ppllava_edge.runtime.language.text_processor import TextProcessor
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, MediaLimits
from ppllava_edge.runtime.pipeline.factory import Pipeline
from ppllava_edge.runtime.session.context import Metrics, Session
from ppllava_edge.runtime.session.video import KEEP, Video
from ppllava_edge.runtime.vision.feature_cache import FeatureCache
from ppllava_edge.runtime.vision.frame_options import DEFAULT_CANDIDATES, FrameOptions

if TYPE_CHECKING:
    from ppllava_edge.runtime.live.view import Live


MAX_THREADS = 1024


class VideoQA(Session):
    """A model that answers questions about videos. A context manager; safe to use from several threads.

    Args:
        bundle: A directory that ppllava-export wrote; None or "nano": the packed demonstration model.
        device: auto | cpu | cuda.
        threads: CPU threads of the engine; None: one per core.
        template: A prompt template's name instead of the bundle's own.
        engine: auto (the fastest that is built and fits), onnxruntime, tensorrt, rtx, standard, or a target
            that ppllava-build built.
        cache: Keep encoded videos on disk: True, a folder, or a FeatureCache.
        parallel: Answers that may be active at once, each with a KV cache of its own.
        queue: How many more may wait; the next raises BusyError.
        metrics: Called with ("open" | "answer" | "frame" | "live", figures) in the thread where the event
            happened, so it should return quickly. Figures are seconds unless stated otherwise.
        limits: What opening and decoding a source may cost; None: MediaLimits().
        isolate: Open and decode every path, camera and stream in a child process, which `limits.memory`
            bounds: its crash is a MediaError. Starting it takes some tenths of a second for each source.

    Raises:
        BundleError: If the bundle is damaged or isn't one; in one line.
        EngineError: If the device or the engine isn't available; in one line.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | None = None,
        device: str = "auto",
        threads: int | None = None,
        template: str | PromptTemplate | None = None,
        engine: str = "auto",
        cache: bool | str | os.PathLike[str] | FeatureCache = False,
        parallel: int = 4,
        queue: int = 64,
        metrics: Metrics | None = None,
        limits: MediaLimits | None = None,
        isolate: bool = False,
    ):
        _check_types(
            bundle=(bundle, (str, os.PathLike), "a folder's path"),
            cache=(cache, (bool, str, os.PathLike, FeatureCache), "True, a folder's path or a FeatureCache"),
            metrics=(metrics, (Callable,), "a function of (event, figures)"),  # type: ignore[arg-type]
            limits=(limits, (MediaLimits,), "a MediaLimits"),
        )
        parallel = integer("parallel", parallel, 1, error=EngineError)
        queue = integer("queue", queue, 0, error=EngineError)
        if threads is not None:
            threads = integer("threads", threads, 1, MAX_THREADS, EngineError)
        pipeline = Pipeline.open(find_bundle(bundle), device, threads, engine)
        super().__init__(pipeline, TextProcessor(pipeline.bundle, template), parallel, queue, metrics)
        self.limits, self.isolate = limits or DEFAULT_LIMITS, isolate
        if isinstance(cache, FeatureCache):
            self.cache: FeatureCache | None = cache
        else:
            self.cache = FeatureCache(None if cache is True else cache) if cache else None

    def open(
        self,
        source: str | bytes | os.PathLike[str] | Sequence[Any],
        frames: int | str | None = None,
        start: float | None = None,
        end: float | None = None,
        progress: Progress | None = None,
        *,
        tokens: int | None = None,
        select: str = "uniform",
        candidates: int = DEFAULT_CANDIDATES,
        keep: str = "features",
        times: Sequence[float] | None = None,
        fps: float | None = None,
        color: str = "rgb",
    ) -> Video:
        """Decode and encode a video once.

        Args:
            source: A video file, an image, an animation, a folder of images, or a sequence of uint8 frames
                (H, W, 3), which must not be drawn into as long as the video is in use.
            frames: How many the model sees; None: its default, and of frames in memory all; "auto": more for
                longer videos.
            start, end: Seconds; None: the whole video. For frames in memory they need times or fps.
            progress: Called with ("decode" | "vision", frames done, frames in all).
            tokens: Maximum number of visual tokens; None: what the model's windows give.
            select: "uniform", or "guided": the question chooses the frames to pool out of `candidates`.
            candidates: Frames to choose among.
            keep: "features": every question pools again. "tokens": a chat; later questions reuse the
                first one's visual tokens and KV cache. "prefix": the same, but the model doesn't see the
                earlier turns.
            times: When each of the frames in memory was taken, ascending seconds.
            fps: Their frames per second, instead of times. Without either their times are their numbers.
            color: The order of their channels: rgb, bgr (OpenCV), rgba, bgra, or gray for (H, W).

        Returns:
            The video, ready for questions.

        Raises:
            MediaError: If the source can't be decoded or doesn't suit the model; in one line.
        """
        self.check_usable()
        options = FrameOptions(frames, start, end, tokens, select, candidates)
        source = checked_source(source, times, fps, color)
        if keep not in KEEP:
            raise MediaError(f"keep must be {', '.join(KEEP)}, not {keep!r}")
        kept = CachedFeatures(self.cache, self.pipeline, source, options, self.limits, self.isolate)
        video = kept.load()
        cached = video is not None
        if video is None:
            started = time.perf_counter()
            reader = reader_of(source, options, self.limits, self.isolate, times, fps, color)
            video = encode_source(self.pipeline, self.engine_lock, reader, options, progress)
            # The rest of the time was spent waiting for frames.
            video.video_decode = time.perf_counter() - started - video.vision
            kept.store(video)
        figures = {"video_decode": video.video_decode, "vision": video.vision}
        self.report("open", {**figures, "frames": len(video.indices), "cached": cached})
        return Video(self, video, keep)

    def warm_up(self) -> None:
        """Open every stage and run each once, so that the first question doesn't have to.

        Takes about as long as that question. Answers and live views go on meanwhile.

        Raises:
            BundleError, EngineError: If a stage can't be opened, or fails.
            BusyError: If too many questions wait.
        """
        from ppllava_edge.runtime.session.warm_up import warm_up  # on first use: many apps don't

        self.check_usable()
        warm_up(self)

    def live(
        self,
        source: str | os.PathLike[str] | None = None,
        fps: float = 2.0,
        window: int = 64,
        *,
        history: float | None = 3600.0,
        realtime: bool = True,
        reconnect: bool = True,
        timeout: float = 10.0,
        format: str | None = None,
        options: Mapping[str, str] | None = None,
        on_state: Callable[[str, str], None] | None = None,
        color: str = "rgb",
    ) -> Live:
        """Watch a camera, a stream, a file in real time, or (source None) frames that the app pushes.

        Questions can be asked at any moment. Arguments and errors: see Live.
        """
        self.check_usable()
        from ppllava_edge.runtime.live.view import Live  # imported on first use: most apps have no live view

        return Live(
            self,
            source,
            fps,
            window,
            history=history,
            realtime=realtime,
            reconnect=reconnect,
            timeout=timeout,
            format=format,
            options=options,
            on_state=on_state,
            color=color,
            limits=self.limits,
            isolate=self.isolate,
        )


def _check_types(**arguments: tuple[Any, tuple[type, ...], str]) -> None:
    """Raise EngineError for an argument of none of its types: name=(value, types, what it must be)."""
    for name, (value, types, wanted) in arguments.items():
        if value is not None and not isinstance(value, types):
            raise EngineError(f"{name} must be {wanted}, not of type {type(value).__name__}")
