"""Who runs when: several questions, videos and cameras share one engine.

Two queues, both first come, first served. Places: at most so many answers are under way at once (each has a KV cache), so many more may wait, the
next is refused. Turns: under way, everybody takes the engine for one call (a batch of frames, one token) and queues again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

from ppllava_edge.engines.errors import BusyError

T = TypeVar("T")
CHECK_EVERY = 0.05  # seconds between looks at whether somebody who waits gave up


class FairSemaphore:
    """A lock that is handed over in the order of asking; count of them may hold it at once.

    waiting: how many may queue, None for any number. what: for the message when there are more. Not re-entrant, but a thread that holds some
    already is let in at once if own_first: it would wait for itself.
    """

    def __init__(self, count: int = 1, waiting: int | None = None, what: str = "", own_first: bool = False):
        self.count, self.max_waiting, self.what, self.own_first = count, waiting, what, own_first
        self._lock = (
            threading.RLock()
        )  # re-entrant: an abandoned stream may be collected, and release its place, anywhere
        self._held = 0
        self._holders: Counter[int] = Counter()
        self._queue: deque[tuple[threading.Lock, int]] = deque()

    @property
    def waiting(self) -> int:
        """How many queue now."""
        return len(self._queue)

    @property
    def held(self) -> int:
        """How many hold it now."""
        return self._held

    def held_here(self) -> bool:
        """Whether this thread holds it."""
        return bool(self._holders[threading.get_ident()])

    def acquire(self, deadline: float | None = None, given_up: Callable[[], bool] | None = None) -> bool:
        """Wait for a turn. deadline: of time.monotonic(). given_up: asked now and then. Returns whether it came; raises BusyError if the queue is full."""
        me = threading.get_ident()
        with self._lock:
            if (self._held < self.count and not self._queue) or (self.own_first and self._holders[me]):
                self._take(me)
                return True
            if self.max_waiting is not None and len(self._queue) >= self.max_waiting:
                raise BusyError(
                    f"{len(self._queue)} {self.what} are waiting already, {self._held} under way; try again later"
                )
            gate = threading.Lock()
            gate.acquire()
            self._queue.append((gate, me))
            self._hand_over()
        try:
            while True:
                left = None if deadline is None else deadline - time.monotonic()
                wait = -1.0 if left is None else max(left, 0.0)
                if given_up is not None:
                    wait = CHECK_EVERY if left is None else min(wait, CHECK_EVERY)
                if gate.acquire(timeout=wait):
                    return True
                if (given_up is not None and given_up()) or (
                    deadline is not None and time.monotonic() >= deadline
                ):
                    return not self._leave(gate, me)
        except BaseException:  # Ctrl-C while waiting: nobody may be handed a turn that they don't take
            if not self._leave(gate, me):
                self.release(me)
            raise

    def _leave(self, gate: threading.Lock, thread: int) -> bool:
        """Leave the queue. Returns False if the turn was handed over at the last moment."""
        with self._lock:
            if (gate, thread) not in self._queue:
                return False
            self._queue.remove((gate, thread))
            return True

    def _take(self, thread: int) -> None:
        self._held += 1
        self._holders[thread] += 1

    def release(self, thread: int | None = None) -> None:
        """Hand over to who has waited longest. thread: who acquired it, if not the caller."""
        with self._lock:
            thread = threading.get_ident() if thread is None else thread
            self._held -= 1
            self._holders[thread] -= 1
            if self._holders[thread] <= 0:
                del self._holders[thread]
            self._hand_over()

    def _hand_over(self) -> None:
        while self._queue and self._held < self.count:
            gate, following = self._queue.popleft()
            self._take(following)
            gate.release()

    def __enter__(self) -> FairSemaphore:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def iterate_under_lock(
    items: Iterator[T], engine_lock: FairSemaphore, ended: Callable[[], bool]
) -> Iterator[T]:
    """The items, each made in a turn of its own, until they end or `ended` says so."""
    while not ended():
        with engine_lock:
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
