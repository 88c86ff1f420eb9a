"""The fair semaphore: FIFO order, bounded queues, deadlines, interrupts."""

from __future__ import annotations

import threading
import time

import pytest

from helpers.stream_server import wait_until
from ppllava_edge import BusyError
from ppllava_edge.runtime.session.admission import FairSemaphore


def test_slots_are_assigned_in_the_order_of_asking() -> None:
    semaphore = FairSemaphore()
    order: list[int] = []
    threads: list[threading.Thread] = []
    semaphore.acquire()

    def work(i: int) -> None:
        with semaphore:
            order.append(i)

    for i in range(20):
        threads.append(threading.Thread(target=work, args=(i,)))
        threads[-1].start()
        assert wait_until(lambda i=i: semaphore.waiting == i + 1)  # type: ignore[misc]
    semaphore.release()
    for thread in threads:
        thread.join()
    assert order == list(range(20)) and semaphore.held == semaphore.waiting == 0


def test_at_most_count_threads_hold_the_semaphore() -> None:
    semaphore, lock = FairSemaphore(3), threading.Lock()
    inside = peak = 0

    def work() -> None:
        nonlocal inside, peak
        for _ in range(50):
            with semaphore:
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
    semaphore, cancelled = FairSemaphore(1, 1, "questions"), threading.Event()
    semaphore.acquire()
    thread = threading.Thread(target=lambda: semaphore.acquire(given_up=cancelled.is_set))
    thread.start()
    assert wait_until(lambda: semaphore.waiting == 1)
    with pytest.raises(BusyError, match="1 questions are waiting already, 1 under way"):
        semaphore.acquire()
    cancelled.set()
    thread.join(5)
    assert semaphore.waiting == 0
    began = time.monotonic()
    assert not semaphore.acquire(deadline=time.monotonic() + 0.05) and time.monotonic() - began < 2
    semaphore.release()
    assert semaphore.acquire(deadline=time.monotonic() + 1)


def test_an_interrupt_while_waiting_leaves_no_trace() -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    semaphore = FairSemaphore()
    semaphore.acquire()
    with pytest.raises(KeyboardInterrupt):
        semaphore.acquire(given_up=interrupt)
    assert semaphore.waiting == 0 and semaphore.held == 1
    semaphore.release()
    assert semaphore.acquire(deadline=time.monotonic() + 1)


def test_a_thread_never_waits_for_its_own_slots() -> None:
    semaphore = FairSemaphore(1, 0, own_first=True)
    assert semaphore.acquire() and semaphore.acquire() and semaphore.held == 2
    semaphore.release()
    semaphore.release()
    assert semaphore.held == 0
