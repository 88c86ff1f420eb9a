"""Live video: frames are encoded as they arrive, questions are answered at any moment.

Only the temporal branch, pooling and the decoder run when a question comes. When the encoder is slower than the camera the newest frame wins, so that
what is answered from is never old; what was passed over is counted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ppllava_edge.engines.errors import MediaError, PPLLaVAError
from ppllava_edge.runtime.live.source import CLOSED, CONNECTING, ENDED, PLAYING, StreamReader
from ppllava_edge.runtime.live.watch import MIN_EVERY, Watch
from ppllava_edge.runtime.live.window import LatestSlot, LiveFrame, Window, evenly_spaced
from ppllava_edge.runtime.media.arrays import rgb_frame
from ppllava_edge.runtime.media.thumbnails import small_picture
from ppllava_edge.runtime.session.answer import Answer, AskOptions
from ppllava_edge.runtime.session.answer_stream import AnswerStream
from ppllava_edge.runtime.session.asynchronous import finished
from ppllava_edge.runtime.session.context import Session
from ppllava_edge.runtime.session.encoded_video import EncodedVideo
from ppllava_edge.runtime.session.video import Video
from ppllava_edge.runtime.vision.preprocess import preprocess_video

if TYPE_CHECKING:
    from typing_extensions import Unpack


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveStatus:
    """state: connecting, playing, reconnecting, ended or closed; why: what was wrong, if something was. seen: frames that arrived; encoded; dropped: due
    but passed over because a newer one was there; kept: in the window now. lag: seconds from a frame's arrival until it was encoded, of the last one.
    age: seconds since the last frame was encoded. losses: how often the stream was lost. size: of the source's frames, (width, height)."""

    state: str
    why: str
    seen: int
    encoded: int
    dropped: int
    kept: int
    lag: float
    age: float
    losses: int
    size: tuple[int, int] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Live:
    """A live view. source: a file (played in real time), a device (/dev/video0), an RTSP, HTTP, UDP or SRT address, or None: the app pushes frames.

    fps: how many frames a second are encoded. window: how many are remembered, densely now and sparser the longer ago. history: seconds after which a
    frame is forgotten; None: never. realtime: play a file at its pace, else as fast as it is encoded, every frame that is due. reconnect, timeout
    (seconds), format, options: of streams, as in StreamReader. on_state: called with (state, why) at every change.
    A context manager; safe to use from several threads. Raises MediaError in one line for what can't work from the start; a stream that doesn't answer
    is no error but a state.
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
        on_state: Callable[[str, str], None] | None = None,
    ):
        if not 0 < fps <= 1000:
            raise MediaError(f"fps must be above 0 and at most 1000, not {fps:g}")
        least = (
            qa.pipeline.manifest.pooling.video.min_frames() if qa.pipeline.manifest.pooling.windowed else 1
        )
        if not least <= window <= 100_000:
            raise MediaError(f"window must be from {least} to 100000 frames, not {window}")
        if timeout <= 0 or (history is not None and history <= 0):
            raise MediaError("timeout and history must be above 0 seconds")
        self.qa, self.fps, self.window = qa, fps, Window(window, history)
        self._realtime, self._on_state = realtime or source is None, on_state
        self._newest: LatestSlot[tuple[Any, float, float]] = LatestSlot()
        self._state, self._why = (CONNECTING, "") if source is not None else (PLAYING, "")
        self._lock, self._arrived = threading.Lock(), threading.Condition()
        self._due = float("-inf")
        self._seen = self._encoded = self._failed = 0
        self._lag, self._last = 0.0, time.monotonic()
        self._size: tuple[int, int] | None = None
        self._began, self._closed = time.monotonic(), False
        self._watches: list[Watch] = []
        self._snapshot: tuple[tuple[int, ...], EncodedVideo] | None = None
        self._reader = None
        if source is not None:
            self._reader = StreamReader(
                source, self._wants, self._offer, self._changed, realtime, reconnect, timeout, format, options
            )
        self._encoder = threading.Thread(target=self._encode, name="ppllava-live-encoder", daemon=True)
        self._encoder.start()
        if self._reader is not None:
            self._reader.start()

    # -- frames in -------------------------------------------------------------------------------------------------------------------------

    def push(self, frame: Any, t: float | None = None, wait: bool = False) -> bool:
        """Give a frame: RGB uint8 (H,W,3), numpy or anything with DLPack (host memory) or, where the engine is on a GPU, __cuda_array_interface__; its size
        may change. t: seconds, rising; None: now. wait: until there is room, instead of replacing a frame that wasn't encoded yet.

        Returns whether it was due (fps). Never waits for the engine unless told to. Raises MediaError after close, or for something that isn't a frame.
        """
        if self._closed:
            raise MediaError("the live view is closed; open another one")
        t = time.monotonic() - self._began if t is None else float(t)
        image = frame if self.qa.pipeline.takes_device_frames(frame) else rgb_frame(frame, "the frame")
        self._seen += 1
        self._size = (int(image.shape[1]), int(image.shape[0]))
        if not self._wants(t):
            return False
        image = (
            image.copy() if isinstance(image, np.ndarray) and not wait else image
        )  # the app may draw into it again
        self._newest.put((image, t, time.monotonic()), wait)
        return True

    def _wants(self, t: float) -> bool:
        """Whether a frame of this time is due. Times may start again (a stream that was lost, a clock that was set)."""
        with self._lock:
            step = 1 / self.fps
            if self._due == float("-inf") or self._due - step > t + step:  # the first, or time went back
                self._due = t
            if t < self._due - 1e-6:
                return False
            self._due = max(self._due + step, t + step / 2)
            return True

    def _offer(self, image: np.ndarray, t: float) -> None:
        self._newest.put((image, t, time.monotonic()), not self._realtime)

    def _encode(self) -> None:
        pipeline, last_time = self.qa.pipeline, float("-inf")
        while (item := self._newest.take()) is not None:
            image, t, arrived = item
            try:
                started = time.perf_counter()
                on_host = isinstance(image, np.ndarray)
                pixels, picture = (
                    (preprocess_video([image], pipeline.manifest.preprocessing), image)
                    if on_host
                    else pipeline.prepare_frame(image)
                )
                with self.qa.engine_lock:
                    (states,) = pipeline.rows(pipeline.encode_trunk(pixels))
                    pipeline.wait()
                picture = small_picture(np.asarray(picture))
            except Exception as error:
                log.exception("a live frame could not be encoded")
                self._failed += 1
                self._changed(self._state, f"a frame could not be encoded: {error}")
                with self._arrived:
                    self._arrived.notify_all()
                continue
            if t <= last_time:  # times began again: what is kept stays in order
                t = last_time + time.monotonic() - self._last
            last_time = t
            self.window.add(LiveFrame(self._encoded, t, states, picture))
            self._encoded += 1
            self._last = time.monotonic()
            self._lag = self._last - arrived
            self.qa.report(
                "frame",
                {"vision": time.perf_counter() - started, "lag": self._lag, "dropped": self._newest.dropped},
            )
            with self._arrived:
                self._arrived.notify_all()

    def _changed(self, state: str, why: str) -> None:
        if self._closed:
            state, why = CLOSED, ""
        if (state, why) == (self._state, self._why):
            return
        self._state, self._why = state, why
        self.qa.report("live", {"state": state, "why": why})
        with self._arrived:
            self._arrived.notify_all()
        if self._on_state is not None:
            try:
                self._on_state(state, why)
            except Exception:
                log.exception("the on_state callback failed")

    # -- what there is ---------------------------------------------------------------------------------------------------------------------

    @property
    def status(self) -> LiveStatus:
        """How it goes, now."""
        reader = self._reader
        seen, losses = (reader.seen, reader.losses) if reader else (self._seen, 0)
        return LiveStatus(
            self._state,
            self._why,
            seen,
            self._encoded,
            self._newest.dropped,
            len(self.window),
            self._lag,
            time.monotonic() - self._last,
            losses,
            reader.size if reader else self._size,
        )

    def wait_for(self, frames: int = 1, timeout: float | None = None) -> bool:
        """Wait until so many frames were encoded, or nothing more can come. Returns whether they were."""

        def no_more() -> bool:  # those on their way through the encoder still come
            return self._state == CLOSED or (
                self._state == ENDED
                and self._newest.put_in == self._newest.dropped + self._encoded + self._failed
            )

        with self._arrived:
            self._arrived.wait_for(lambda: self._encoded >= frames or no_more(), timeout)
        return self._encoded >= frames

    def video(self, last: float | None = None, frames: int | None = None) -> Video:
        """What is remembered now, as a Video that can be asked again and again.

        last: only the last so many seconds. frames: how many the model sees, default its own, evenly out of what is remembered. Raises MediaError if
        nothing was seen yet (it says what the stream does instead), or for more frames than the model knows.
        """
        if last is not None and last <= 0:
            raise MediaError(f"last must be above 0 seconds, not {last:g}")
        found, m = self.window.frames(last), self.qa.pipeline.manifest
        if not found:
            s = self.status
            raise MediaError(
                f"nothing was seen yet: the live view is {s.state}{f' ({s.why})' if s.why else ''}, {s.seen} frames arrived"
            )
        count = (
            min(m.vision.default_frames, m.vision.max_frames or m.vision.default_frames)
            if frames is None
            else frames
        )
        if count < 1:
            raise MediaError(f"frames must be 1 or more, not {count}")
        self.qa.pipeline.check_frames(count)
        least = m.pooling.video.min_frames() if m.pooling.windowed else 1
        chosen = [found[i] for i in evenly_spaced(len(found), max(min(count, len(found)), least))]
        return Video(self.qa, self._encode_window(chosen))

    def _encode_window(self, chosen: list[LiveFrame]) -> EncodedVideo:
        """Features of these frames; those of the last call, if they are the same."""
        numbers, snapshot = tuple(f.number for f in chosen), self._snapshot
        if snapshot is not None and snapshot[0] == numbers:
            return snapshot[1]
        started, pipeline = time.perf_counter(), self.qa.pipeline
        with self.qa.engine_lock:
            features = pipeline.branch(pipeline.join((f.states for f in chosen), len(chosen)))
            pipeline.wait()
        times = [f.seconds for f in chosen]
        encoded_video = EncodedVideo(
            "video",
            "video",
            list(numbers),
            times,
            self.fps,
            times[-1] - times[0],
            self._encoded,
            len(chosen),
            features,
            pictures={f.number: f.picture for f in chosen},
            vision=time.perf_counter() - started,
        )
        self._snapshot = numbers, encoded_video
        return encoded_video

    # -- questions -------------------------------------------------------------------------------------------------------------------------

    def stream(
        self,
        question: str,
        last: float | None = None,
        frames: int | None = None,
        wait: float = 0.0,
        **asking: Unpack[AskOptions],
    ) -> AnswerStream:
        """Answer from what is remembered now, piece by piece. wait: seconds to wait for a first frame. asking: as Video.stream."""
        if wait and not len(self.window):
            self.wait_for(1, wait)
        return self.video(last, frames).stream(question, **asking)

    def ask(
        self,
        question: str,
        last: float | None = None,
        frames: int | None = None,
        wait: float = 0.0,
        **asking: Unpack[AskOptions],
    ) -> Answer:
        """Answer from what is remembered now. last: only the last so many seconds. wait: seconds to wait for a first frame. asking: as Video.ask.

        Raises MediaError if nothing was seen yet.
        """
        return self.stream(question, last, frames, wait, **asking).exhaust()

    async def ask_async(
        self,
        question: str,
        last: float | None = None,
        frames: int | None = None,
        wait: float = 0.0,
        **asking: Unpack[AskOptions],
    ) -> Answer:
        """The same for asyncio. Cancelling the task ends the answer within one token."""
        stream = await asyncio.to_thread(self.stream, question, last, frames, wait, **asking)
        return await finished(stream)

    def watch(
        self,
        question: str,
        every: float = 5.0,
        on_answer: Callable[[Answer], None] | None = None,
        *,
        last: float | None = None,
        changes_only: bool = False,
        on_error: Callable[[PPLLaVAError], None] | None = None,
        **asking: Unpack[AskOptions],
    ) -> Watch:
        """Ask the same question every so many seconds, in a thread, until the watch is stopped or the view closed.

        on_answer: called with each answer; changes_only: only when its text differs from the last. A question that takes longer than `every` delays the
        next, none pile up. on_error: called with what went wrong (nothing seen yet, engine busy); the watch goes on.
        """
        if self._closed:
            raise MediaError("the live view is closed; open another one")
        if not every >= MIN_EVERY:
            raise MediaError(f"every must be {MIN_EVERY:g} seconds or more, not {every:g}")

        def ask() -> AnswerStream:
            return self.stream(question, last, **asking)

        watch = Watch(ask, every, on_answer, changes_only, on_error)
        self._watches = [w for w in self._watches if w.running] + [watch]
        return watch

    async def watch_async(
        self,
        question: str,
        every: float = 5.0,
        *,
        last: float | None = None,
        changes_only: bool = False,
        **asking: Unpack[AskOptions],
    ) -> AsyncIterator[Answer]:
        """The same for asyncio: `async for answer in live.watch_async(…)`. Ends when the view is closed."""
        before: str | None = None
        while not self._closed:
            began = time.monotonic()
            try:
                answer = await self.ask_async(question, last, wait=every, **asking)
            except MediaError as error:  # nothing was seen yet
                log.debug("%s", error)
            else:
                if not (changes_only and answer.text == before):
                    before = answer.text
                    yield answer
            await asyncio.sleep(max(every - (time.monotonic() - began), 0))

    def close(self) -> None:
        """Stop watching, reading and encoding. What was remembered can still be asked through Videos that were made before."""
        if self._closed:
            return
        self._closed = True
        for watch in self._watches:
            watch.stop()
        self._newest.close()
        if self._reader is not None:
            self._reader.close()
        if self._encoder is not threading.current_thread():
            self._encoder.join()
        self._changed(CLOSED, "")

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
