"""What a live view remembers: a fixed number of encoded frames, dense now and sparser the longer ago, so that memory is flat for days."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class LiveFrame:
    """An encoded frame. number: counted from the first; seconds: when it was taken; states (1,S,P+1,C): of the trunk; picture: small RGB uint8."""

    number: int
    seconds: float
    states: Any
    picture: np.ndarray


class Window:
    """At most `capacity` frames. The newest half is kept as it comes; of the older ones the frame goes whose neighbours lie closest together for its
    age, so that distances grow with age. history: seconds after which a frame is forgotten in any case; None: never."""

    def __init__(self, capacity: int, history: float | None = None):
        self.capacity, self.history = capacity, history
        self._frames: list[LiveFrame] = []
        self._lock = threading.Lock()

    def add(self, frame: LiveFrame) -> None:
        """Remember a frame, newer than all others; forget one if there are too many."""
        with self._lock:
            frames = self._frames
            frames.append(frame)
            if self.history is not None:
                while len(frames) > 1 and frames[0].seconds < frame.seconds - self.history:
                    frames.pop(0)
            if len(frames) > self.capacity:
                frames.pop(least_missed([f.seconds for f in frames]))

    def frames(self, last: float | None = None) -> list[LiveFrame]:
        """What is remembered, oldest first. last: only of so many seconds before the newest."""
        with self._lock:
            found = list(self._frames)
        return (
            found if last is None or not found else [f for f in found if f.seconds > found[-1].seconds - last]
        )

    def __len__(self) -> int:
        with self._lock:
            return len(self._frames)


def least_missed(times: Sequence[float]) -> int:
    """Which of these frames (seconds, ascending) to forget: in the older half, the one with the smallest gap around it for its age. Never the oldest:
    that one goes by `history`."""
    half = len(times) // 2
    if half < 2:
        return 0
    t = np.asarray(times, np.float64)
    gap, age = t[2 : half + 1] - t[: half - 1], t[-1] - t[1:half]
    return 1 + int(np.argmin(gap / np.maximum(age, 1e-9)))


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` positions, evenly, the last included; all, the last repeated, if there are fewer."""
    if count <= wanted:
        return [*range(count), *([count - 1] * (wanted - count))]
    return [round(i) for i in np.linspace(0, count - 1, wanted)] if wanted > 1 else [count - 1]


class LatestSlot(Generic[T]):
    """Room for one item: who puts never waits (unless told to), who takes gets the newest. put_in, dropped: items so far, and those of
    them that were replaced before anybody took them."""

    def __init__(self) -> None:
        self.put_in = self.dropped = 0
        self._item: deque[T] = deque(maxlen=1)
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T, wait: bool = False) -> None:
        """Leave an item. wait: until the one before was taken, instead of replacing it."""
        with self._changed:
            while wait and self._item and not self._closed:
                self._changed.wait()
            self.put_in += 1
            self.dropped += len(self._item)
            self._item.append(item)
            self._changed.notify_all()

    def take(self) -> T | None:
        """The newest item; waits for one. None when closed."""
        with self._changed:
            while not self._item and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            item = self._item.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Let everybody go who waits."""
        with self._changed:
            self._closed = True
            self._item.clear()
            self._changed.notify_all()
