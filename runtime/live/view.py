"""Live video: frames are encoded as they arrive, questions are answered at any moment.

A question costs the temporal branch, pooling and the decoder only. When the encoder is slower than the
camera, the newest frame replaces the waiting one, so answers never lag behind; dropped frames are counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.encoding.encoded_video import EncodedVideo
from ppllava_edge.runtime.live.encoder import FramePacer, LiveEncoder
from ppllava_edge.runtime.live.questions import LiveQuestions
from ppllava_edge.runtime.live.reconnect import StreamReader
from ppllava_edge.runtime.live.source import LiveSource
from ppllava_edge.runtime.live.status import (
    CLOSED,
    CONNECTING,
    ENDED,
    PLAYING,
    LiveStatus,
    OnState,
    ViewState,
)
from ppllava_edge.runtime.live.window import LiveFrame, Window, evenly_spaced
from ppllava_edge.runtime.media.arrays import rgb_frame
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, MediaLimits
from ppllava_edge.runtime.session.context import Session
from ppllava_edge.runtime.session.video import Video

MAX_FPS = 1000
MAX_WINDOW = 100_000  # frames


class Live(LiveQuestions):
    """A live view of a camera, a stream, a file, or frames that the app pushes.

    A context manager; safe to use from several threads.

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
        limits: MediaLimits = DEFAULT_LIMITS,
        isolate: bool = False,
    ):
        super().__init__()
        self.qa = qa
        self._pacer = FramePacer(fps)
        self.fps = fps
        self._check(window, history, timeout)
        self.window = Window(window, history)
        self._state = ViewState(PLAYING if source is None else CONNECTING, qa.report, on_state)
        self._encoder = LiveEncoder(qa, self.window, self._state.notify, self._encoding_failed)
        self._created = time.monotonic()
        self._pushed = 0
        self._pushed_size: tuple[int, int] | None = None
        self._snapshot: tuple[tuple[int, ...], EncodedVideo] | None = None
        self._reader: StreamReader | None = None
        if source is not None:

            def deliver(image: np.ndarray, t: float) -> None:
                self._encoder.put(image, t, wait=not realtime)

            live_source = _source_kind(isolate)(
                source, self._pacer.is_due, deliver, realtime, timeout, format, options, limits
            )
            self._reader = StreamReader(live_source, self._state.change, reconnect)
        self._encoder.start()
        if self._reader is not None:
            self._reader.start()

    @property
    def fps(self) -> float:
        """Frames to encode per second; may be changed at any time."""
        return self._pacer.fps

    @fps.setter
    def fps(self, fps: float) -> None:
        if not 0 < fps <= MAX_FPS:
            raise MediaError(f"fps must be above 0 and at most {MAX_FPS}, not {fps:g}")
        self._pacer.fps = fps

    @property
    def _min_frames(self) -> int:
        """The fewest frames that the model's pooling takes."""
        return self.qa.pipeline.manifest.pooling.min_frames

    def _check(self, window: int, history: float | None, timeout: float) -> None:
        if not self._min_frames <= window <= MAX_WINDOW:
            raise MediaError(f"window must be from {self._min_frames} to {MAX_WINDOW} frames, not {window}")
        if timeout <= 0 or (history is not None and history <= 0):
            raise MediaError("timeout and history must be above 0 seconds")

    def _encoding_failed(self, why: str) -> None:
        self._state.change(self._state.state, why)

    def push(self, frame: Any, t: float | None = None, wait: bool = False) -> bool:
        """Push a frame into the view.

        Args:
            frame: RGB uint8 (H, W, 3): numpy, anything with DLPack in host memory, or, where the engine is
                on a GPU, anything with __cuda_array_interface__. The size may change.
            t: When it was taken, ascending seconds; None: now.
            wait: Block until the encoder has room, instead of replacing a frame that wasn't encoded yet.

        Returns:
            Whether the frame was due (fps) and will be encoded. Doesn't wait for the engine unless `wait` is
            set.

        Raises:
            MediaError: If the view is closed, or this isn't a frame.
        """
        self.qa.check_usable()
        if self.closed:
            raise MediaError("the live view is closed; open another one")
        t = time.monotonic() - self._created if t is None else float(t)
        image = frame if self.qa.pipeline.takes_device_frames(frame) else rgb_frame(frame, "the frame")
        self._pushed += 1
        self._pushed_size = (int(image.shape[1]), int(image.shape[0]))
        if not self._pacer.is_due(t):
            return False
        if isinstance(image, np.ndarray) and not wait:
            image = image.copy()  # a copy: the app may reuse its buffer
        self._encoder.put(image, t, wait)
        return True

    @property
    def closed(self) -> bool:
        """Whether the view was closed."""
        return self._state.closed

    @property
    def status(self) -> LiveStatus:
        """A snapshot of the current status."""
        reader, encoder = self._reader, self._encoder
        return LiveStatus(
            state=self._state.state,
            why=self._state.why,
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
        """
        encoder, state = self._encoder, self._state

        def no_more() -> bool:
            return state.state == CLOSED or (state.state == ENDED and not encoder.pending)

        state.wait_for(lambda: encoder.encoded >= frames or no_more(), timeout)
        return encoder.encoded >= frames

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
        self.qa.check_usable()
        if last is not None and last <= 0:
            raise MediaError(f"last must be above 0 seconds, not {last:g}")
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
        if frames < 1:
            raise MediaError(f"frames must be 1 or more, not {frames}")
        self.qa.pipeline.check_frames(frames)
        count = max(min(frames, len(available)), self._min_frames)
        chosen = [available[i] for i in evenly_spaced(len(available), count)]
        return Video(self.qa, self._encode_window(chosen))

    def _encode_window(self, chosen: list[LiveFrame]) -> EncodedVideo:
        """Run the temporal branch over these frames; the last call's result if they are the same."""
        numbers = tuple(f.number for f in chosen)
        snapshot = self._snapshot
        if snapshot is not None and snapshot[0] == numbers:
            return snapshot[1]
        started, pipeline = time.perf_counter(), self.qa.pipeline
        with self.qa.engine_lock:
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
        self._snapshot = numbers, encoded_video
        return encoded_video

    def close(self) -> None:
        """Stop watches, reading and encoding. Videos created before can still be asked."""
        if self._state.closed:
            return
        self._state.closed = True
        self._stop_watches()
        self._encoder.close()  # first: the reader may be waiting for it
        if self._reader is not None:
            self._reader.close()
        self._encoder.join()
        self._state.change(CLOSED)

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _source_kind(isolate: bool) -> type[LiveSource]:
    """The class that reads live sources: in this process, or in one of their own."""
    if not isolate:
        return LiveSource
    from ppllava_edge.runtime.live.isolated_source import IsolatedSource  # most apps start no process

    return IsolatedSource
