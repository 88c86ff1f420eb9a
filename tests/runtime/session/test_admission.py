"""The fair semaphore: FIFO order, bounded queues, deadlines, interrupts."""

from __future__ import annotations

import linecache
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from random import Random
from types import FrameType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helpers.stream_server import wait_until
from ppllava_edge import BusyError
from ppllava_edge.runtime.session import admission
from ppllava_edge.runtime.session.admission import FairSemaphore, Patience, Slot, iterate_under_lock


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    """A thread that does this, started."""
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def run_in_thread(work: Callable[[], Any]) -> None:
    """Do this in another thread, and raise here what it raises."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    in_thread(guarded).join(30)
    if errors:
        raise errors[0]


def test_slots_are_assigned_in_the_order_of_asking() -> None:
    semaphore = FairSemaphore()
    order: list[int] = []
    threads: list[threading.Thread] = []
    slot = semaphore.acquire()
    assert slot is not None

    def work(i: int) -> None:
        with semaphore.hold():
            order.append(i)

    for i in range(20):
        threads.append(threading.Thread(target=work, args=(i,)))
        threads[-1].start()
        assert wait_until(lambda i=i: semaphore.waiting == i + 1)  # type: ignore[misc]
    slot.release()
    for thread in threads:
        thread.join()
    assert order == list(range(20)) and semaphore.held == semaphore.waiting == 0


def test_at_most_count_threads_hold_the_semaphore() -> None:
    semaphore, lock = FairSemaphore(3), threading.Lock()
    inside = peak = 0

    def work() -> None:
        nonlocal inside, peak
        for _ in range(50):
            with semaphore.hold():
                with lock:
                    inside += 1
                    peak = max(peak, inside)
                time.sleep(0.0001)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert peak <= 3 and semaphore.held == semaphore.waiting == 0


def test_waiting_ends_by_a_full_queue_a_deadline_or_cancelling() -> None:
    semaphore, cancelled, found = FairSemaphore(1, 1, "questions"), threading.Event(), list[Slot | None]()
    slot = semaphore.acquire()
    assert slot is not None
    waiting = in_thread(lambda: found.append(semaphore.acquire(Patience(cancelled=cancelled.is_set))))
    assert wait_until(lambda: semaphore.waiting == 1)

    def refused() -> None:
        with pytest.raises(BusyError, match="1 questions are waiting already, 1 under way"):
            semaphore.acquire()

    run_in_thread(refused)
    cancelled.set()
    waiting.join(5)
    assert found == [None] and semaphore.waiting == 0
    run_in_thread(lambda: found.append(semaphore.acquire(Patience(0.05))))
    assert found == [None, None] and semaphore.waiting == 0
    slot.release()
    slot.release()  # twice is once
    assert semaphore.held == 0 and semaphore.acquire(Patience(1)) is not None


def test_a_deadline_waits_as_long_as_it_says() -> None:
    semaphore, waited = FairSemaphore(), list[float]()
    slot = semaphore.acquire()

    def work() -> None:
        began = time.monotonic()
        assert semaphore.acquire(Patience(0.2)) is None
        waited.append(time.monotonic() - began)

    run_in_thread(work)
    assert slot is not None and waited[0] >= 0.2


def test_a_thread_never_waits_for_its_own_slots() -> None:
    semaphore = FairSemaphore(2, 4, "questions", "answer", "close its streams")
    slots = [semaphore.acquire() for _ in range(2)]
    with pytest.raises(BusyError, match=r"this thread has 2 unfinished answers itself.*close its streams"):
        semaphore.acquire()
    assert semaphore.held == 2 and semaphore.waiting == 0 and all(slots)
    slots.pop()
    assert semaphore.held == 1, "a slot that nobody refers to is free"
    with pytest.raises(BusyError, match="3 unfinished"), semaphore.hold():
        semaphore.acquire(elsewhere=1)
    engine_lock = FairSemaphore()
    with pytest.raises(BusyError, match="don't call the model from inside"), engine_lock.hold():
        engine_lock.acquire()


def test_an_ended_threads_slot_is_not_its_successors() -> None:
    """The system uses a thread's id again."""
    semaphore, slots = FairSemaphore(), list[Slot | None]()
    run_in_thread(lambda: slots.append(semaphore.acquire()))
    for _ in range(20):
        run_in_thread(lambda: slots.append(semaphore.acquire(Patience(0.01))))
    assert slots[0] is not None and slots[1:] == [None] * 20


def test_a_destructor_may_release_a_slot_inside_the_semaphores_own_code() -> None:
    """The garbage collector may run at any step of any thread, also inside acquire and release."""
    semaphore, taken = FairSemaphore(2), list[Slot]()

    def collect(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != admission.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and taken:
            sys.settrace(None)
            taken.clear()
            sys.settrace(collect)
        return collect

    for _ in range(200):
        other = semaphore.acquire()
        slot = semaphore.acquire()
        assert slot is not None and other is not None
        taken.append(slot)
        del slot
        sys.settrace(collect)
        try:
            other.release()
        finally:
            sys.settrace(None)
        assert semaphore.held == 0


def in_destructor(frame: FrameType | None) -> bool:
    """Python drops exceptions there, interrupts as well."""
    return frame is not None and (frame.f_code.co_name == "__del__" or in_destructor(frame.f_back))


def use_acquire(semaphore: FairSemaphore) -> None:
    slot = semaphore.acquire()
    assert slot is not None
    with slot:
        pass


def use_hold(semaphore: FairSemaphore) -> None:
    with semaphore.hold():
        pass


def use_steps(semaphore: FairSemaphore) -> None:
    for _ in iterate_under_lock(iter([1, 2]), semaphore, Patience()):
        assert not semaphore.held


@pytest.mark.parametrize("use_it", [use_acquire, use_hold, use_steps])
def test_an_interrupt_at_any_step_loses_no_slot(use_it: Callable[[FairSemaphore], None]) -> None:
    """Ctrl-C raises KeyboardInterrupt in the main thread between two lines or before the first."""

    interrupts = 0
    for step in range(1000):
        semaphore, countdown = FairSemaphore(1), [step]

        def interrupt(frame: FrameType, event: str, argument: Any, countdown: list[int] = countdown) -> Any:
            if frame.f_code.co_filename != admission.__file__ or in_destructor(frame):
                return None
            line = linecache.getline(admission.__file__, frame.f_lineno)
            if (
                event in ("call", "line") and "with self._lock" not in line
            ):  # Python itself makes `with lock:` safe
                countdown[0] -= 1
                if countdown[0] == -1:
                    raise KeyboardInterrupt
            return interrupt

        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            use_it(semaphore)
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            sys.settrace(before)
        run_in_thread(partial(use_it, semaphore))  # whatever was left undone
        assert semaphore.held == semaphore.waiting == 0, step
        if countdown[0] >= 0:
            break
    assert 20 < interrupts == step


class Admission(RuleBasedStateMachine):
    """Any order of asking, giving up, releasing and dropping, against a model: a list and a set."""

    def __init__(self) -> None:
        super().__init__()
        self.semaphore = FairSemaphore(2, 3)
        self.queue: list[Waiting] = []
        self.admitted: list[Waiting] = []

    @rule()
    def ask(self) -> None:
        if len(self.admitted) < 2 or len(self.queue) < 3:
            waiting = Waiting(self.semaphore)
            (self.admitted if len(self.admitted) < 2 else self.queue).append(waiting)
            assert wait_until(lambda: self.semaphore.waiting == len(self.queue))
        else:
            with pytest.raises(BusyError, match="3 threads are waiting already, 2 under way"):
                self.semaphore.acquire()

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        waiting = self.queue.pop(data.draw(st.integers(0, len(self.queue) - 1)))
        waiting.cancelled.set()
        waiting.thread.join(10)
        assert waiting.slots == [None]

    @precondition(lambda self: self.admitted)
    @rule(data=st.data(), how=st.sampled_from(["release", "drop", "elsewhere"]))
    def free(self, data: st.DataObject, how: str) -> None:
        waiting = self.admitted.pop(data.draw(st.integers(0, len(self.admitted) - 1)))
        slot = waiting.slots.pop()
        assert slot is not None
        if how == "release":
            slot.release()
        elif how == "elsewhere":
            run_in_thread(slot.release)
        del slot
        if self.queue:
            self.admitted.append(self.queue.pop(0))

    @invariant()
    def first_come_first_served(self) -> None:
        for waiting in self.admitted:
            waiting.thread.join(10)
            assert len(waiting.slots) == 1 and waiting.slots[0] is not None
        assert all(not waiting.slots for waiting in self.queue)
        assert self.semaphore.held == len(self.admitted) and self.semaphore.waiting == len(self.queue)

    def teardown(self) -> None:
        for waiting in self.queue:
            waiting.cancelled.set()
            waiting.thread.join(10)


class Waiting:
    """A thread that asks for a slot. slots: what it got, once it got something."""

    def __init__(self, semaphore: FairSemaphore):
        self.slots: list[Slot | None] = []
        self.cancelled = threading.Event()
        patience = Patience(cancelled=self.cancelled.is_set)
        self.thread = in_thread(lambda: self.slots.append(semaphore.acquire(patience)))


TestAdmission = Admission.TestCase
TestAdmission.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_random_use_by_many_threads_loses_no_slot() -> None:
    semaphore, lock, errors = FairSemaphore(3, 6), threading.Lock(), list[BaseException]()
    inside = peak = 0

    def work(seed: int) -> None:
        nonlocal inside, peak
        random = Random(seed)
        try:
            for _ in range(150):
                try:
                    slot = semaphore.acquire(Patience(random.choice([0.0001, 0.002, 1.0])))
                except BusyError:
                    continue
                if slot is None:
                    continue
                with lock:
                    inside += 1
                    peak = max(peak, inside)
                time.sleep(random.choice([0, 0.0005]))
                with lock:
                    inside -= 1
                if random.random() < 0.5:
                    slot.release()
                del slot
        except BaseException as error:
            errors.append(error)

    threads = [in_thread(partial(work, seed)) for seed in range(12)]
    for thread in threads:
        thread.join(60)
    assert not errors and 1 <= peak <= 3 and semaphore.held == semaphore.waiting == 0
