"""The encoded frames that a live view keeps: a fixed number, sparser with age, so that memory stays flat."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LiveFrame:
    """An encoded frame.

    Attributes:
        number: Counted from the first encoded frame.
        seconds: When it was taken.
        states: (1, S, P+1, C), hidden states of the vision trunk.
        picture: Small RGB uint8 (H, W, 3).
    """

    number: int
    seconds: float
    states: Any
    picture: np.ndarray


class Window:
    """A thread-safe buffer of encoded frames.

    The newest half of the frames is kept as it comes. Of the older ones, the frame with the smallest gap
    between its neighbours relative to its age is evicted, so gaps grow with age.

    Args:
        capacity: Frames to keep.
        history: Seconds after which a frame is evicted in any case; None: never.
    """

    def __init__(self, capacity: int, history: float | None = None):
        self.capacity, self.history = capacity, history
        self._frames: list[LiveFrame] = []
        self._lock = threading.RLock()  # re-entrant: a signal handler may ask for the status

    def add(self, frame: LiveFrame) -> None:
        """Append a frame, newer than all others; evict one if the window is full."""
        with self._lock:
            frames = self._frames
            frames.append(frame)
            if self.history is not None:
                oldest = frame.seconds - self.history
                del frames[: next(i for i, f in enumerate(frames) if f.seconds >= oldest)]
            if len(frames) > self.capacity:
                frames.pop(frame_to_evict([f.seconds for f in frames]))

    def frames(self, last: float | None = None) -> list[LiveFrame]:
        """The frames, oldest first.

        Args:
            last: Only frames from this many seconds before the newest; None: all.
        """
        with self._lock:
            frames = list(self._frames)
        if last is None or not frames:
            return frames
        return [f for f in frames if f.seconds > frames[-1].seconds - last]

    def arrays(self) -> list[Any]:
        """The arrays that it holds: states and small pictures."""
        return [array for frame in self.frames() for array in (frame.states, frame.picture)]

    def __len__(self) -> int:
        with self._lock:
            return len(self._frames)


def frame_to_evict(times: Sequence[float]) -> int:
    """Choose the frame of a full window to evict.

    Args:
        times: When the frames were taken, ascending seconds.

    Returns:
        The position, in the older half, of the frame with the smallest gap between its neighbours relative to
        its age. Never the oldest frame of four or more: that one is evicted by `history`.
    """
    half = len(times) // 2
    if half < 2:
        return 0
    t = np.asarray(times, np.float64)
    gap = t[2 : half + 1] - t[: half - 1]
    age = t[-1] - t[1:half]
    return 1 + int(np.argmin(gap / np.maximum(age, 1e-9)))


def evenly_spaced(count: int, chosen: int) -> list[int]:
    """Choose positions evenly.

    Args:
        count: Positions to choose from.
        chosen: Positions to choose.

    Returns:
        `chosen` of range(count), ascending, the last position included; if count is smaller, all of them,
        with the last one repeated.
    """
    if count <= chosen:
        return [*range(count), *([count - 1] * (chosen - count))]
    if chosen == 1:
        return [count - 1]
    return [round(i) for i in np.linspace(0, count - 1, chosen)]
