"""Reading a live source in a thread, and reconnecting when the camera or the stream is lost."""

from __future__ import annotations

import logging
import threading
import time

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.live.source import LiveSource
from ppllava_edge.runtime.live.status import CLOSED, ENDED, PLAYING, RECONNECTING, OnState
from ppllava_edge.runtime.live.threads import Worker, one_line

log = logging.getLogger(__name__)
# Seconds before each attempt; the last is repeated. The sequence restarts after an attempt that delivered
# frames.
BACK_OFF = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
END_OF_STREAM = "the stream ended"


class StreamReader:
    """Reads a source in a thread until it ends or is closed; opens a lost stream again, with growing pauses.

    Args:
        source: The source to read.
        on_state: Called with (state, why) at every frame and every loss.
        reconnect: Whether to open a lost stream again. Files are never opened again.

    Attributes:
        source: The source.
        losses: How often the stream was lost.
    """

    def __init__(self, source: LiveSource, on_state: OnState, reconnect: bool = True):
        self.source = source
        self.losses = 0
        self._reconnect = reconnect and not source.is_file
        self._on_state = on_state
        self._closed = threading.Event()
        self._thread = Worker(self._run, "ppllava-live-source")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, grace: float = 1.0) -> None:
        """Stop the thread.

        Args:
            grace: Seconds to wait for it. A read that hangs in the network ends by itself at its timeout.
                In a callback, it isn't waited for.
        """
        self._closed.set()
        self._thread.wait_for_end(time.monotonic() + grace)

    def _run(self) -> None:
        attempt = 0
        while not self._closed.is_set():
            seen_before = self.source.seen
            why = self._read()
            if self._closed.is_set():
                break
            if not self._reconnect:
                expected = self.source.is_file and why == END_OF_STREAM
                self._on_state(ENDED, "" if expected else why)
                return
            if self.source.seen > seen_before:
                attempt = 0
            self._pause(attempt, why)
            attempt += 1
        self._on_state(CLOSED, "")

    def _read(self) -> str:
        """Read the source once. Returns why it ended."""
        try:
            self.source.read(self._closed, lambda: self._on_state(PLAYING, ""))
        except MediaError as error:
            return str(error)
        except Exception as error:
            log.exception("reading %s failed", self.source.name)
            return f"{type(error).__name__}: {one_line(error)}"
        return END_OF_STREAM

    def _pause(self, attempt: int, why: str) -> None:
        """Count and report a loss, then wait before the next attempt."""
        self.losses += 1
        pause = BACK_OFF[min(attempt, len(BACK_OFF) - 1)]
        log.warning("%s: %s; trying again in %g s", self.source.name, why, pause)
        self._on_state(RECONNECTING, f"{why}; trying again in {pause:g} s")
        self._closed.wait(pause)
