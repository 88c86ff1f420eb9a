"""The state and the counters of a live view."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

log = logging.getLogger(__name__)
CONNECTING, PLAYING, RECONNECTING, ENDED, CLOSED = "connecting", "playing", "reconnecting", "ended", "closed"

OnState = Callable[[str, str], None]  # the state, and why


@dataclass(frozen=True)
class LiveStatus:
    """A snapshot of a live view's status.

    Attributes:
        state: connecting, playing, reconnecting, ended or closed.
        why: The last problem; "" if there is none.
        seen: Frames that arrived.
        encoded: Frames that were encoded.
        dropped: Frames that were due but skipped, because a newer one had arrived.
        kept: Frames in the window now.
        lag: Seconds from the arrival of the last encoded frame until it was encoded.
        age: Seconds since a frame was last encoded.
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
    """The state of a live view; threads can wait for it to change.

    Args:
        state: The first state.
        report: Called with ("live", figures) at every change.
        on_state: The app's callback, called with (state, why) at every change.

    Attributes:
        state, why: See LiveStatus.
        closed: Set it before threads are stopped: from then on CLOSED is the only state.
    """

    def __init__(
        self, state: str, report: Callable[[str, dict[str, Any]], None], on_state: OnState | None = None
    ):
        self.state, self.why = state, ""
        self.closed = False
        self._report, self._on_state = report, on_state
        self._changed = threading.Condition()

    def change(self, state: str, why: str = "") -> None:
        """Enter a state and report it, unless nothing changes. Errors of the app's callback are logged."""
        if self.closed:
            state, why = CLOSED, ""
        if (state, why) == (self.state, self.why):
            return
        self.state, self.why = state, why
        self._report("live", {"state": state, "why": why})
        self.notify()
        if self._on_state is not None:
            try:
                self._on_state(state, why)
            except Exception:
                log.exception("the on_state callback failed")

    def notify(self) -> None:
        """Wake all threads in wait_for."""
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool], timeout: float | None) -> None:
        """Block until the condition holds, checked at every notification, or for `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(condition, timeout)
