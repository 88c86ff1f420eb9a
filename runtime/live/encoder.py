"""The encoder thread of a live view: frames that are due go through the vision trunk into the window."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ppllava_edge.runtime.live.latest_slot import LatestSlot
from ppllava_edge.runtime.live.threads import Worker, one_line
from ppllava_edge.runtime.live.window import LiveFrame, Window
from ppllava_edge.runtime.media.thumbnails import small_picture
from ppllava_edge.runtime.session.context import Session
from ppllava_edge.runtime.vision.preprocess import preprocess_video

log = logging.getLogger(__name__)
TOLERANCE = 1e-6  # seconds that a frame may be early
MAX_STEP = 1e9  # seconds


class FramePacer:
    """Picks `fps` frames per second out of a faster stream. Thread-safe; fps may be changed at any time."""

    def __init__(self, fps: float):
        self.fps = fps
        self._next: float | None = None
        self._lock = threading.Lock()

    def is_due(self, t: float) -> bool:
        """Whether to encode the frame taken at t seconds.

        Times may restart, when a stream is reconnected or a clock is set.
        """
        step = min(1 / self.fps, MAX_STEP)
        with self._lock:
            if self._next is None or self._next - step > t + step:
                self._next = t
            if t < self._next - TOLERANCE:
                return False
            self._next = max(self._next + step, t + step / 2)
            return True


class LiveEncoder:
    """Encodes frames in a thread; a new frame replaces one that is still waiting.

    Args:
        session: The model, the engine lock, the metrics.
        window: Takes the encoded frames.
        on_progress: Called after every frame, encoded or failed.
        on_problem: Called with the reason when a frame can't be encoded, and with "" when one was.

    Attributes:
        encoded, failed: Frames so far.
        last_encoded: When the last frame was encoded, by time.monotonic().
        lag: Seconds from the last frame's arrival until it was encoded.
    """

    def __init__(
        self,
        session: Session,
        window: Window,
        on_progress: Callable[[], None],
        on_problem: Callable[[str], None],
    ):
        self.encoded = self.failed = 0
        self.last_encoded = time.monotonic()
        self.lag = 0.0
        self._session, self._window = session, window
        self._on_progress, self._on_problem = on_progress, on_problem
        self._last_problem = ""
        self._slot: LatestSlot[tuple[Any, float, float]] = LatestSlot()  # image, seconds, arrival
        self._last_time = float("-inf")
        self._thread = Worker(self._run, "ppllava-live-encoder")

    @property
    def dropped(self) -> int:
        """Frames that were replaced before they were encoded."""
        return self._slot.dropped

    @property
    def pending(self) -> int:
        """Frames still to be encoded."""
        return self._slot.put_in - self._slot.dropped - self.encoded - self.failed

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Accept no more frames; a waiting frame is dropped, the current one is finished (join)."""
        self._slot.close()

    def join(self, until: float | None = None) -> None:
        """Wait for the thread's end, after close, until then (time.monotonic()). In a callback, don't."""
        self._thread.wait_for_end(until)

    def put(self, image: Any, t: float, wait: bool) -> bool:
        """Hand over a frame.

        Args:
            image: RGB uint8 (H, W, 3), on the host or on the engine's GPU.
            t: When it was taken, seconds.
            wait: Block until the previous frame was taken, instead of replacing it; in the encoder's own
                thread (in a callback), which would take it, don't.

        Returns:
            Whether it was taken: not after close.
        """
        wait = wait and threading.current_thread() is not self._thread
        return self._slot.put((image, t, time.monotonic()), wait)

    def wait_until_idle(self, wait_for: Callable[[Callable[[], bool], float | None], None]) -> None:
        """Wait until no frame is left; `wait_for` is ViewState's. In the encoder's own thread, don't."""
        if threading.current_thread() is not self._thread:
            wait_for(lambda: self.pending <= 0, None)

    def _run(self) -> None:
        while True:
            item = self._slot.take()
            if item is None:
                return
            problem = ""
            try:
                figures = self._encode(*item)
            except BaseException as error:  # a thread that dies here would leave the view blind
                self.failed += 1
                problem = f"a frame could not be encoded: {one_line(error)}"
                level = logging.DEBUG if problem == self._last_problem else logging.ERROR
                log.log(level, "a live frame could not be encoded", exc_info=True)
            else:
                self._session.report("frame", figures)
            del item  # not to keep the picture while waiting for the next one
            self._last_problem = problem
            self._on_problem(problem)
            self._on_progress()

    def _encode(self, image: Any, t: float, arrived: float) -> dict[str, Any]:
        """Encode a frame into the window. Returns figures for the metrics."""
        session, pipeline = self._session, self._session.pipeline
        started = time.perf_counter()
        if isinstance(image, np.ndarray):
            pixels, picture = preprocess_video([image], pipeline.manifest.preprocessing), image
        else:
            pixels, picture = pipeline.prepare_frame(image)
        pipeline.load("encoding")
        with session.engine_lock.hold():
            (states,) = pipeline.rows(pipeline.encode_trunk(pixels))
            pipeline.wait()
        picture = small_picture(np.asarray(picture))
        if t <= self._last_time:  # times restarted: keep the window in order
            t = self._last_time + time.monotonic() - self.last_encoded
        self._last_time = t
        self._window.add(LiveFrame(self.encoded, t, states, picture))
        self.encoded += 1
        self.last_encoded = time.monotonic()
        self.lag = self.last_encoded - arrived
        vision = time.perf_counter() - started
        return {"vision": vision, "lag": self.lag, "dropped": self.dropped}
