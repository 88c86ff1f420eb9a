"""The state and the counters of a live view."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ppllava_edge.runtime.session.callbacks import call_app

MAX_UNREPORTED = 1000  # changes of state that wait for a slow callback; older ones are left out
CONNECTING, PLAYING, RECONNECTING, ENDED, CLOSED = "connecting", "playing", "reconnecting", "ended", "closed"

OnState = Callable[[str, str], None]  # the state, and why


@dataclass(frozen=True)
class LiveStatus:
    """A snapshot of a live view's status.

    Attributes:
        state: connecting, playing, reconnecting, ended or closed.
        why: The problem that lasts; "" if there is none.
        seen: Frames that arrived.
        encoded: Frames that were encoded.
        dropped: Frames that were due but skipped, because a newer one had arrived.
        kept: Frames in the window now.
        lag: Seconds from the arrival of the last encoded frame until it was encoded; 0 before the first.
        age: Seconds since a frame was last encoded; before the first, since the view was opened.
        losses: How often the stream was lost.
        size: (width, height) of the source's frames in pixels; None before the first.
    """

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
        """The attributes, for JSON."""
        return asdict(self)


class ViewState:
    """The state of a live view; threads can wait for it to change. Thread-safe, also inside its callbacks.

    Changes are reported in their order, one at a time, without any lock held: a callback may ask for the
    status, or close the view. A change inside a callback is reported after it.

    Args:
        state: The first state.
        report: Called with ("live", figures) at every change.
        on_state: The app's callback, called with (state, why) at every change.
    """

    def __init__(
        self, state: str, report: Callable[[str, dict[str, Any]], None], on_state: OnState | None = None
    ):
        self._state, self._why, self._problem = state, "", ""
        self._closed = False
        self._report, self._on_state = report, on_state
        self._changed = threading.Condition()  # re-entrant: a destructor may close a view in any thread
        self._unreported: deque[tuple[str, str]] = deque(maxlen=MAX_UNREPORTED)
        self._reporting = False

    @property
    def now(self) -> tuple[str, str]:
        """The state, and why: see LiveStatus."""
        with self._changed:
            return self._state, self._why or self._problem

    @property
    def closed(self) -> bool:
        """Whether closing has begun."""
        return self._closed

    def begin_closing(self) -> bool:
        """Allow no state but CLOSED from now on. Returns False if that was called before."""
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.notify_all()
            return first

    def change(self, state: str, why: str = "") -> None:
        """Enter a state, and report it unless nothing changes."""
        with self._changed:
            if self._closed and state != CLOSED:
                return
            before = self.now
            self._state, self._why = state, why
            if state == CLOSED:
                self._problem = ""
            self._note_change(before)
        self._report_changes()

    def problem(self, why: str) -> None:
        """Say why frames can't be encoded; "": they can again. The state stays."""
        with self._changed:
            if self._closed:
                return
            before = self.now
            self._problem = why
            self._note_change(before)
        self._report_changes()

    def notify(self) -> None:
        """Wake all threads in wait_for."""
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool], timeout: float | None) -> None:
        """Block until the condition holds, checked at every notification, or for `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(condition, timeout)

    def _note_change(self, before: tuple[str, str]) -> None:
        if self.now != before:
            self._unreported.append(self.now)
            self._changed.notify_all()

    def _report_changes(self) -> None:
        """Report what hasn't been, unless a thread is doing so: that one goes on with it."""
        while True:
            with self._changed:
                if self._reporting or not self._unreported:
                    return
                self._reporting = True
                state, why = self._unreported.popleft()
            try:
                self._report("live", {"state": state, "why": why})
                if self._on_state is not None:
                    call_app("on_state", self._on_state, state, why)
            finally:
                with self._changed:
                    self._reporting = False
