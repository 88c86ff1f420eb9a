"""Scheduling: several questions, videos and live views share one engine, first come, first served.

There are two semaphores (session/context.py). Admission limits how many answers are active, since each holds
a KV cache; a limited number of questions may queue, and any more are refused. The engine lock is held for one
engine call (a batch of frames, a pooling, one token), so active answers take turns, round robin.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

from ppllava_edge.engines.errors import BusyError

T = TypeVar("T")
POLL = 0.05  # seconds between checks whether a waiting thread was cancelled


class EndedEarly(Exception):
    """An answer ends before its last token. Internal: it never reaches the app.

    Attributes:
        finish: Why: "cancelled" or "timeout".
    """

    def __init__(self, finish: str):
        super().__init__(finish)
        self.finish = finish


class Patience:
    """How long a question may take.

    Args:
        timeout: Seconds from now; None: as long as it takes.
        cancelled: Polled while waiting, and between calls of the engine.

    Attributes:
        timeout, cancelled: As given.
        deadline: By time.monotonic(), which no change of the system's clock moves; None: none.
    """

    def __init__(self, timeout: float | None = None, cancelled: Callable[[], bool] = lambda: False):
        self.timeout, self.cancelled = timeout, cancelled
        self.deadline = None if timeout is None else time.monotonic() + timeout

    def ended(self) -> str:
        """Why the answer should end now: "cancelled", "timeout" or "" (go on)."""
        if self.cancelled():
            return "cancelled"
        return "timeout" if self.deadline is not None and time.monotonic() >= self.deadline else ""

    def check(self) -> None:
        """Raise EndedEarly if the answer should end now."""
        if finish := self.ended():
            raise EndedEarly(finish)

    def hold(self, semaphore: FairSemaphore) -> Slot:
        """Wait for a slot. Raises EndedEarly if the answer should end first."""
        slot = semaphore.acquire(self)
        if slot is None:
            raise EndedEarly(self.ended() or "timeout")
        return slot


class _Thread(threading.local):
    """Stands for the calling thread. (A thread's id may be used again after its end.)"""

    def __init__(self) -> None:
        self.token = object()


_thread = _Thread()


class Holder:
    """The thread that has to free a slot: a stream may be handed to another one.

    Attributes:
        thread: The thread's token. At first, the thread that created this.
    """

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = _thread.token

    def move_here(self) -> None:
        """From now on it is the calling thread."""
        self.thread = _thread.token

    @property
    def is_here(self) -> bool:
        """Whether it is the calling thread."""
        return self.thread is _thread.token


class _Ticket:
    """A place in the queue, then a slot. gate: what to wait at; it opens on admission."""

    __slots__ = ("gate", "holder")

    def __init__(self, holder: Holder):
        self.holder = holder
        self.gate = threading.Lock()
        self.gate.acquire()


class Slot:
    """A slot of a semaphore, held until it is released or nobody refers to it any more. A context manager.

    So no slot is lost to an interrupt (Ctrl-C) between acquiring it and the try block that releases it.
    """

    _is_released = True  # if an interrupt comes before __init__

    def __init__(self, semaphore: FairSemaphore, ticket: _Ticket):
        self._semaphore, self._ticket, self._is_released = semaphore, ticket, False

    def release(self) -> None:
        """Free the slot. Safe from any thread, from a destructor, and twice."""
        if not self._is_released:
            self._semaphore._release(self._ticket)
            self._is_released = True

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class FairSemaphore:
    """A counting semaphore with a FIFO queue: a released slot goes to the thread that has waited longest.

    A plain threading.Semaphore wakes any waiter, and a thread that releases and acquires in a loop starves
    the others. The semaphore is no context manager, its slots are: an interrupt (Ctrl-C) may come before the
    first line of __exit__, and only a slot that nobody refers to any more is released even then.

    A thread that holds slots never waits for another one: it might wait for itself. It gets a free slot, or
    BusyError.

    Args:
        count: Slots: how many may be held at once.
        waiting: How many may queue; None: any number.
        what: What holds a slot (plural), for the error when the queue is full.
        unfinished: What a thread that holds slots has, in the singular, for the error when none is free.
        advice: What such a thread should do.
    """

    def __init__(
        self,
        count: int = 1,
        waiting: int | None = None,
        what: str = "threads",
        unfinished: str = "engine call",
        advice: str = "don't call the model from inside its own calls",
    ):
        self.count, self.max_waiting = count, waiting
        self._what, self._unfinished, self._advice = what, unfinished, advice
        # A destructor may release a slot at any point of any thread, also inside the critical sections below.
        # So a release only appends to a list, which whoever holds the lock works off. Every step of that may
        # be repeated after an interrupt.
        self._lock = threading.RLock()
        self._released: deque[_Ticket] = deque()
        self._admitted: set[_Ticket] = set()
        self._queue: deque[_Ticket] = deque()
        self._process = os.getpid()

    @property
    def waiting(self) -> int:
        """Threads in the queue."""
        return len(self._queue)

    @property
    def held(self) -> int:
        """Slots that are taken."""
        return len(self._admitted)

    def held_here(self) -> int:
        """Slots that the calling thread holds."""
        with self._lock:
            return sum(ticket.holder.is_here for ticket in self._admitted)

    def acquire(
        self, patience: Patience | None = None, holder: Holder | None = None, elsewhere: int = 0
    ) -> Slot | None:
        """Wait for a slot.

        Args:
            patience: When to give up; None: never.
            holder: Who has to free it; None: the calling thread.
            elsewhere: Slots that the calling thread holds of other semaphores, because of which it may not
                wait for this one either.

        Returns:
            The slot; None if it gave up.

        Raises:
            BusyError: If the queue is full, or the calling thread may not wait.
        """
        ticket = _Ticket(holder or Holder())
        slot = Slot(self, ticket)
        try:
            if self._enter(ticket, elsewhere) or self._wait(ticket, patience):
                return slot
        except BaseException:
            slot.release()
            raise
        slot.release()  # leaves the queue
        return None

    def hold(self) -> Slot:
        """`acquire`, for as long as it takes: `with semaphore.hold():`."""
        slot = self.acquire()
        assert slot is not None  # without patience it doesn't give up
        return slot

    def _enter(self, ticket: _Ticket, elsewhere: int) -> bool:
        """Take a free slot, or queue. Returns whether a slot was taken."""
        try:
            with self._lock:
                self._update()
                if len(self._admitted) < self.count and not self._queue:
                    self._admitted.add(ticket)
                    return True
                self._check_wait(elsewhere)
                self._queue.append(ticket)
                return False
        finally:
            self._settle()

    def _check_wait(self, elsewhere: int) -> None:
        """Raise BusyError if the calling thread may not wait, or the queue is full."""
        own = elsewhere + self.held_here()
        if own:
            unfinished = self._unfinished if own == 1 else f"{self._unfinished}s"
            raise BusyError(
                f"no slot is free, and this thread has {own} unfinished {unfinished} itself: "
                f"it might wait for ever, so {self._advice}"
            )
        if self.max_waiting is not None and len(self._queue) >= self.max_waiting:
            raise BusyError(
                f"{len(self._queue)} {self._what} are waiting already, {len(self._admitted)} under way; "
                "try again later"
            )

    def _wait(self, ticket: _Ticket, patience: Patience | None) -> bool:
        """Wait for admission. Returns False at the deadline, or if cancelled."""
        while True:
            timeout = POLL if patience is not None else 20 * POLL
            if patience is not None and patience.deadline is not None:
                timeout = min(timeout, max(patience.deadline - time.monotonic(), 0.0))
            # The second test, and the call, are for a thread that was interrupted before it opened the gate.
            if ticket.gate.acquire(timeout=timeout) or ticket in self._admitted:
                return True
            self._settle()
            if patience is not None and patience.ended():
                return False

    def _release(self, ticket: _Ticket) -> None:
        self._released.append(ticket)
        self._settle()

    def _settle(self) -> None:
        """Free what was released, and admit the head of the queue."""
        if os.getpid() != self._process:  # a forked child: a thread of its parent may hold the lock for ever
            return
        # If this thread holds the lock already, this is a destructor inside a critical section.
        while self._released and not self._lock._is_owned():  # type: ignore[attr-defined]
            with self._lock:
                self._update()

    def _update(self) -> None:
        """`_settle`, in a critical section."""
        while self._released:
            ticket = self._released[0]
            self._admitted.discard(ticket)
            if ticket in self._queue:
                self._queue.remove(ticket)
            self._released.popleft()
        while self._queue and (len(self._admitted) < self.count or self._queue[0] in self._admitted):
            ticket = self._queue[0]
            self._admitted.add(ticket)
            self._queue.popleft()
            ticket.gate.release()


def iterate_under_lock(items: Iterator[T], engine_lock: FairSemaphore, patience: Patience) -> Iterator[T]:
    """Yield items, holding the lock while each is produced, and not in between.

    Args:
        items: Each step calls the engine.
        engine_lock: Acquired for each step.
        patience: Ends the iteration, also while waiting for the lock.
    """
    slot: Slot | None = None
    try:
        while not patience.ended():
            slot = engine_lock.acquire(patience)
            if slot is None:
                return
            with slot:
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
    finally:
        if slot is not None:  # an interrupt may have come before the first line of __enter__ or __exit__
            slot.release()
