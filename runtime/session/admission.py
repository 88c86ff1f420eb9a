"""Scheduling: several questions, videos and live views share one engine, first come, first served.

There are two semaphores (session/context.py). Admission limits how many answers are active, since each holds
a KV cache; a limited number of questions may queue, and any more are refused. The engine lock is held for one
engine call (a batch of frames, a pooling, one token), so active answers take turns, round robin.
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
POLL = 0.05  # seconds between checks whether a waiting thread was cancelled


class FairSemaphore:
    """A counting semaphore with a FIFO queue: a released slot goes to the thread that has waited longest.

    A plain threading.Semaphore wakes any waiter, and a thread that releases and acquires in a loop starves
    the others. Not re-entrant, unless own_first is set.

    Args:
        count: Slots: how many may hold it at once.
        waiting: How many may queue; None: any number.
        what: What holds a slot, for the error when the queue is full.
        own_first: Admit a thread that already holds a slot at once, even beyond count: otherwise it would
            wait for itself.
    """

    def __init__(self, count: int = 1, waiting: int | None = None, what: str = "", own_first: bool = False):
        self.count, self.max_waiting, self.what, self.own_first = count, waiting, what, own_first
        # Re-entrant: the garbage collector may close an abandoned stream, which releases its slot, in any
        # thread.
        self._lock = threading.RLock()
        self._held = 0
        self._holders: Counter[int] = Counter()  # thread id → slots
        self._queue: deque[tuple[threading.Lock, int]] = deque()  # a gate to wait at, thread id

    @property
    def waiting(self) -> int:
        """Threads in the queue."""
        return len(self._queue)

    @property
    def held(self) -> int:
        """Slots that are taken."""
        return self._held

    def held_here(self) -> bool:
        """Whether the calling thread holds a slot."""
        return bool(self._holders[threading.get_ident()])

    def acquire(self, deadline: float | None = None, given_up: Callable[[], bool] | None = None) -> bool:
        """Wait for a slot.

        Args:
            deadline: By time.monotonic(); None: wait as long as it takes.
            given_up: Polled while waiting; True ends the wait.

        Returns:
            Whether a slot was acquired.

        Raises:
            BusyError: If the queue is full.
        """
        thread = threading.get_ident()
        gate = self._enter(thread)
        if gate is None:
            return True
        try:
            if self._wait(gate, deadline, given_up):
                return True
            return not self._leave(gate, thread)
        except BaseException:  # Ctrl-C while waiting: give back a slot that was assigned meanwhile
            if not self._leave(gate, thread):
                self.release(thread)
            raise

    def _enter(self, thread: int) -> threading.Lock | None:
        """Take a free slot, or queue. Returns the gate to wait at, None if a slot was taken."""
        with self._lock:
            is_free = self._held < self.count and not self._queue
            if is_free or (self.own_first and self._holders[thread]):
                self._take(thread)
                return None
            if self.max_waiting is not None and len(self._queue) >= self.max_waiting:
                raise BusyError(
                    f"{len(self._queue)} {self.what} are waiting already, {self._held} under way; "
                    "try again later"
                )
            gate = threading.Lock()
            gate.acquire()
            self._queue.append((gate, thread))
            self._assign()
            return gate

    def _wait(
        self, gate: threading.Lock, deadline: float | None, given_up: Callable[[], bool] | None
    ) -> bool:
        """Wait until the gate opens. Returns False at the deadline, or if given up."""
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            timeout = -1.0 if left is None else max(left, 0.0)  # -1: without limit
            if given_up is not None:
                timeout = POLL if left is None else min(timeout, POLL)
            if gate.acquire(timeout=timeout):
                return True
            if given_up is not None and given_up():
                return False
            if deadline is not None and time.monotonic() >= deadline:
                return False

    def _leave(self, gate: threading.Lock, thread: int) -> bool:
        """Leave the queue. Returns False if a slot was assigned at the last moment."""
        with self._lock:
            if (gate, thread) not in self._queue:
                return False
            self._queue.remove((gate, thread))
            return True

    def _take(self, thread: int) -> None:
        self._held += 1
        self._holders[thread] += 1

    def release(self, thread: int | None = None) -> None:
        """Free a slot and assign it to the thread that has waited longest.

        Args:
            thread: Id of the thread that acquired it; None: the caller.
        """
        with self._lock:
            thread = threading.get_ident() if thread is None else thread
            self._held -= 1
            self._holders[thread] -= 1
            if self._holders[thread] <= 0:
                del self._holders[thread]
            self._assign()

    def _assign(self) -> None:
        """Assign free slots to the head of the queue."""
        while self._queue and self._held < self.count:
            gate, thread = self._queue.popleft()
            self._take(thread)
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
    """Yield items, holding the lock while each is produced, and not in between.

    Args:
        items: Each step calls the engine.
        engine_lock: Acquired for each step.
        ended: Checked before each step; True ends the iteration.
    """
    while not ended():
        with engine_lock:
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
