"""Live video: frames are encoded as they arrive, questions are answered at any moment.

A question costs the temporal branch, pooling and the decoder only. When the encoder is slower than the
camera, the newest frame replaces the waiting one, so answers never lag behind; dropped frames are counted.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.encoding.encoded_video import EncodedVideo
from ppllava_edge.runtime.language.numbers import finite_number, integer
from ppllava_edge.runtime.live.encoder import FramePacer, LiveEncoder
from ppllava_edge.runtime.live.questions import LiveQuestions, check_last
from ppllava_edge.runtime.live.reconnect import StreamReader
from ppllava_edge.runtime.live.source import LiveSource, check_source_options
from ppllava_edge.runtime.live.status import (
    CLOSED,
    CONNECTING,
    ENDED,
    PLAYING,
    LiveStatus,
    OnState,
    ViewState,
)
from ppllava_edge.runtime.live.threads import Worker
from ppllava_edge.runtime.live.window import LiveFrame, Window, evenly_spaced
from ppllava_edge.runtime.media.arrays import CHANNELS, rgb_frame
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, MediaLimits
from ppllava_edge.runtime.session.admission import Patience
from ppllava_edge.runtime.session.answer import MAX_TIMEOUT
from ppllava_edge.runtime.session.context import Session
from ppllava_edge.runtime.session.video import Video

MAX_FPS = 1000
MAX_TIME = 1e11  # seconds, 3000 years; a larger time was given in milliseconds or nanoseconds
MAX_WINDOW = 100_000  # frames


class Live(LiveQuestions):
    """A live view of a camera, a stream, a file, or frames that the app pushes.

    A context manager; safe to use from several threads. Callbacks (on_state, a watch's, metrics) run in the
    view's threads, so they should return quickly; they may ask for the status and close the view, but must
    not wait for its frames. What they raise is logged. A view that nobody refers to any more ends by itself.

    Args:
        qa: The model.
        source: A file (played in real time), a device (/dev/video0), an RTSP, HTTP, UDP or SRT address;
            None: the app pushes frames.
        fps: Frames to encode per second.
        window: Encoded frames to keep, dense now and sparser with age.
        history: Seconds after which a frame is evicted; None: never.
        realtime: Play a file at its own pace; otherwise as fast as it is encoded, without dropping frames.
        reconnect: Open a lost stream again.
        timeout: Seconds without data, or without a frame, after which a stream counts as lost.
        format: FFmpeg's input format, for devices and unusual streams.
        options: FFmpeg's input options.
        on_state: Called with (state, why) at every change of state.
        color: The order of the channels of pushed frames: "rgb", "bgr" (OpenCV's), "rgba", "bgra" or "gray".
        limits: What opening and decoding the source may cost.
        isolate: Open and decode it in a child process.

    Attributes:
        qa, fps: As given.
        window: The encoded frames.

    Raises:
        MediaError: If the arguments or the source can't work; in one line. A stream that doesn't respond is a
            state, not an error.
    """

    def __init__(
        self,
        qa: Session,
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
        on_state: OnState | None = None,
        color: str = "rgb",
        limits: MediaLimits = DEFAULT_LIMITS,
        isolate: bool = False,
    ):
        super().__init__()
        self.qa = qa
        self._pacer = FramePacer(1.0)
        self.fps = fps
        self._check(window, history, timeout, on_state, color)
        check_source_options(source, format, options, color)
        self.window = Window(window, history)
        self._state = ViewState(PLAYING if source is None else CONNECTING, qa.report, on_state)
        self._encoder = LiveEncoder(qa, self.window, self._state.notify, self._state.problem)
        self._created = time.monotonic()
        self._color = color
        self._pushed = 0
        self._pushed_size: tuple[int, int] | None = None
        self._push_lock = threading.Lock()
        self._snapshot: tuple[tuple[int, ...], EncodedVideo] | None = None
        self._reader: StreamReader | None = None
        if source is not None:
            encoder = self._encoder  # the reader's thread must not refer to the view: nobody could drop it

            def deliver(image: np.ndarray, t: float) -> None:
                encoder.put(image, t, wait=not realtime)

            live_source = _source_kind(isolate)(
                source, self._pacer.is_due, deliver, realtime, timeout, format, options, limits
            )
            self._reader = StreamReader(live_source, self._state.change, reconnect)
        self._when_dropped = weakref.finalize(self, _end_later, self._state, self._encoder, self._reader)
        self._when_dropped.atexit = False
        try:
            self._encoder.start()
            if self._reader is not None:
                self._reader.start()
            qa.register(self)
        except BaseException:  # the model was closed meanwhile, or there are too many threads
            self.close()
            raise

    @property
    def fps(self) -> float:
        """Frames to encode per second; may be changed at any time."""
        return self._pacer.fps

    @fps.setter
    def fps(self, fps: float) -> None:
        number = finite_number("fps", fps, MediaError)
        if not 0 < number <= MAX_FPS:
            raise MediaError(f"fps must be above 0 and at most {MAX_FPS}, not {number:g}")
        self._pacer.fps = number

    @property
    def _min_frames(self) -> int:
        """The fewest frames that the model's pooling takes."""
        return self.qa.pipeline.manifest.pooling.min_frames

    def _check(
        self, window: int, history: float | None, timeout: float, on_state: OnState | None, color: str
    ) -> None:
        integer("window", window, self._min_frames, MAX_WINDOW, MediaError)
        for name, seconds in (("timeout", timeout), ("history", history)):
            if seconds is not None and not 0 < finite_number(name, seconds, MediaError) <= MAX_TIMEOUT:
                raise MediaError(f"{name} must be above 0 seconds and at most {MAX_TIMEOUT:g}")
        if timeout is None:
            raise MediaError("timeout must be a number of seconds, not None")
        if on_state is not None and not callable(on_state):
            raise MediaError(f"on_state must be a function, not of type {type(on_state).__name__}")
        if color not in CHANNELS:
            raise MediaError(f"color must be {', '.join(CHANNELS)}, not {color!r}")

    def push(self, frame: Any, t: float | None = None, wait: bool = False) -> bool:
        """Push a frame into the view. May be called from several threads.

        Args:
            frame: uint8 (H, W, 3), or as the view's color says: numpy, anything with DLPack in host memory,
                or, where the engine is on a GPU, RGB with __cuda_array_interface__. The size may change. A
                frame in host memory is copied; one in GPU memory must stay unchanged until it was encoded.
            t: When it was taken, ascending seconds; None: now.
            wait: Block until the encoder has room, instead of replacing a frame that wasn't encoded yet; for
                a frame in GPU memory, until it was encoded.

        Returns:
            Whether the frame was due (fps) and will be encoded. Doesn't wait for the engine unless `wait` is
            set.

        Raises:
            MediaError: If the view is closed or has a source of its own, this isn't a frame, or t isn't a
                time.
        """
        self.qa.check_usable()
        if self.closed:
            raise MediaError("the live view is closed; open another one")
        if self._reader is not None:
            raise MediaError("this live view has a source; push frames into one opened without a source")
        t = time.monotonic() - self._created if t is None else finite_number("t", t, MediaError)
        if abs(t) > MAX_TIME:
            raise MediaError(f"t must be in seconds; {t:g} is too large")
        on_device = self.qa.pipeline.takes_device_frames(frame)
        if on_device and self._color != "rgb":
            raise MediaError(f"frames in GPU memory must be RGB, but the view's color is {self._color!r}")
        image = frame if on_device else rgb_frame(frame, "the frame", self._color)
        shape = image.shape if hasattr(image, "shape") else frame.__cuda_array_interface__["shape"]
        with self._push_lock:
            self._pushed += 1
            self._pushed_size = (int(shape[1]), int(shape[0])) if len(shape) > 1 else None
        if not self._pacer.is_due(t):
            return False
        if not on_device:
            image = image.copy()  # the app may reuse its buffer
        taken = self._encoder.put(image, t, wait)
        if on_device and wait:
            self._encoder.wait_until_idle(self._state.wait_for)
        return taken

    @property
    def closed(self) -> bool:
        """Whether the view was closed."""
        return self._state.closed

    @property
    def status(self) -> LiveStatus:
        """A snapshot of the current status. Raises EngineError in a forked child."""
        self.qa.check_process()
        reader, encoder = self._reader, self._encoder
        state, why = self._state.now
        return LiveStatus(
            state=state,
            why=why,
            seen=reader.source.seen if reader else self._pushed,
            encoded=encoder.encoded,
            dropped=encoder.dropped,
            kept=len(self.window),
            lag=encoder.lag,
            age=time.monotonic() - encoder.last_encoded,
            losses=reader.losses if reader else 0,
            size=reader.source.size if reader else self._pushed_size,
        )

    def wait_for(self, frames: int = 1, timeout: float | None = None) -> bool:
        """Block until `frames` frames were encoded, or no more can come.

        Args:
            frames: Counted from the view's start.
            timeout: Seconds; None: as long as it takes.

        Returns:
            Whether they were encoded.

        Raises:
            MediaError: If an argument can't be used.
        """
        self.qa.check_process()
        integer("frames", frames, 0, error=MediaError)
        if timeout is not None:
            timeout = min(finite_number("timeout", timeout, MediaError), MAX_TIMEOUT)
        return self._wait_for(frames, timeout, lambda: False)

    def _wait_for(self, frames: int, timeout: float | None, cancelled: Callable[[], bool]) -> bool:
        encoder, state = self._encoder, self._state

        def no_more() -> bool:
            return state.closed or cancelled() or (state.now[0] == ENDED and not encoder.pending)

        state.wait_for(lambda: encoder.encoded >= frames or no_more(), timeout)
        return encoder.encoded >= frames

    def _wake(self) -> None:
        self._state.notify()

    def video(self, last: float | None = None, frames: int | None = None) -> Video:
        """The window's frames as a Video, which can be asked any number of questions.

        Args:
            last: Seconds to look back from the newest frame; None: the whole window.
            frames: How many the model sees, evenly spaced; None: its default.

        Returns:
            A Video; it doesn't change when the view continues or is closed.

        Raises:
            MediaError: If no frame was encoded yet (the message gives the state), or `frames` exceeds the
                model's maximum.
        """
        return self._video(last, frames, Patience())

    def _video(self, last: float | None, frames: int | None, patience: Patience) -> Video:
        self.qa.check_usable()
        check_last(last)
        available = self.window.frames(last)
        if not available:
            s = self.status
            why = f" ({s.why})" if s.why else ""
            raise MediaError(
                f"nothing was seen yet: the live view is {s.state}{why}, {s.seen} frames arrived"
            )
        if frames is None:
            vision = self.qa.pipeline.manifest.vision
            frames = min(vision.default_frames, vision.max_frames or vision.default_frames)
        frames = integer("frames", frames, 1, error=MediaError)
        self.qa.pipeline.check_frames(frames)
        count = max(min(frames, len(available)), self._min_frames)
        chosen = [available[i] for i in evenly_spaced(len(available), count)]
        return Video(self.qa, self._encode_window(chosen, patience))

    def _encode_window(self, chosen: list[LiveFrame], patience: Patience) -> EncodedVideo:
        """Run the temporal branch over these frames; the last call's result if they are the same."""
        numbers = tuple(f.number for f in chosen)
        snapshot = self._snapshot
        if snapshot is not None and snapshot[0] == numbers:
            return snapshot[1]
        started, pipeline = time.perf_counter(), self.qa.pipeline
        pipeline.load("encoding")
        with patience.hold(self.qa.engine_lock):
            features = pipeline.branch(pipeline.join((f.states for f in chosen), len(chosen)))
            pipeline.wait()
        times = [f.seconds for f in chosen]
        encoded_video = EncodedVideo(
            kind="video",
            media="video",
            indices=list(numbers),
            times=times,
            fps=self.fps,
            duration=times[-1] - times[0],
            source_frames=self._encoder.encoded,
            count=len(chosen),
            features=features,
            pictures={f.number: f.picture for f in chosen},
            vision=time.perf_counter() - started,
        )
        self._snapshot = numbers, replace(encoded_video, vision=0.0)  # its time is spent once
        return encoded_video

    def arrays(self) -> list[Any]:
        """The arrays that it holds: the window, and the last snapshot's features."""
        snapshot = self._snapshot
        return [*self.window.arrays(), *(snapshot[1].arrays() if snapshot is not None else [])]

    def release(self, timeout: float | None) -> None:
        """The model is closed: close the view. See session.context.Dependent."""
        self._close(timeout)

    def close(self) -> None:
        """Stop watches, reading and encoding, and wait for their threads (a second for one that reads).

        Videos created before can still be asked. May be called twice, from any thread, and in any callback,
        where it doesn't wait.
        """
        self._close(None)

    def _close(self, timeout: float | None) -> None:
        if self.qa.forked or not self._state.begin_closing():  # a forked child has none of the threads
            return
        until = None if timeout is None else time.monotonic() + timeout
        self._when_dropped.detach()
        try:
            _end(self._state, self._encoder, self._reader)
            self._stop_watches(until)
            if self._reader is not None:
                self._reader.close()
            self._encoder.join(until)
        finally:
            self._state.change(CLOSED)

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _end(state: ViewState, encoder: LiveEncoder, reader: StreamReader | None) -> None:
    """Tell a view's threads to end, without waiting for them."""
    state.begin_closing()
    encoder.close()  # first: the reader may be waiting for it
    if reader is not None:
        reader.close(grace=0.0)


def _end_later(state: ViewState, encoder: LiveEncoder, reader: StreamReader | None) -> None:
    """End the threads of a view that nobody refers to any more.

    In a thread of its own: a destructor may run at any point of any thread, also inside a lock's own code.
    """
    with contextlib.suppress(RuntimeError):  # no thread can be started: the process ends
        Worker(lambda: _end(state, encoder, reader), "ppllava-live-end").start()


def _source_kind(isolate: bool) -> type[LiveSource]:
    """The class that reads live sources: in this process, or in one of their own."""
    if not isolate:
        return LiveSource
    from ppllava_edge.runtime.live.isolated_source import IsolatedSource  # most apps start no process

    return IsolatedSource
