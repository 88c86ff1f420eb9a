"""Who runs when: fair turns, bounded queues, answers that can be cancelled; frames that are decoded ahead."""

from __future__ import annotations

import gc
import threading
import time
from itertools import pairwise

import pytest

from helpers.commands import SAMPLE
from helpers.stream_server import wait_until
from ppllava_edge import BusyError, PromptError, VideoQA
from ppllava_edge.runtime.media.prefetch import prefetch
from ppllava_edge.runtime.session.admission import FairSemaphore

QUESTIONS = [
    "What color is the circle?",
    "Describe the video.",
    "How many objects are there?",
    "Where is the blue square?",
    "Is there a red circle?",
]


@pytest.fixture(scope="module")
def qa() -> VideoQA:
    return VideoQA(device="cpu")


# -- turns -------------------------------------------------------------------------------------------------------------------------------


def test_turns_come_in_the_order_of_asking() -> None:
    engine_lock, order, threads = FairSemaphore(), list[int](), list[threading.Thread]()
    engine_lock.acquire()

    def work(i: int) -> None:
        with engine_lock:
            order.append(i)

    for i in range(20):
        threads.append(threading.Thread(target=work, args=(i,)))
        threads[-1].start()
        assert wait_until(lambda i=i: engine_lock.waiting == i + 1)  # type: ignore[misc]
    engine_lock.release()
    for thread in threads:
        thread.join()
    assert order == list(range(20)) and engine_lock.held == engine_lock.waiting == 0


def test_nobody_is_in_at_once_with_more_than_allowed() -> None:
    engine_lock, inside, most, lock = FairSemaphore(3), 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with engine_lock:
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.0001)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 3 and engine_lock.held == engine_lock.waiting == 0


def test_a_full_queue_a_deadline_and_giving_up() -> None:
    engine_lock, gone = FairSemaphore(1, 1, "questions"), threading.Event()
    engine_lock.acquire()
    thread = threading.Thread(target=lambda: engine_lock.acquire(given_up=gone.is_set))
    thread.start()
    assert wait_until(lambda: engine_lock.waiting == 1)
    with pytest.raises(BusyError, match="1 questions are waiting already, 1 under way"):
        engine_lock.acquire()
    gone.set()
    thread.join(5)
    assert engine_lock.waiting == 0
    began = time.monotonic()
    assert not engine_lock.acquire(deadline=time.monotonic() + 0.05) and time.monotonic() - began < 2
    engine_lock.release()
    assert engine_lock.acquire(deadline=time.monotonic() + 1)


def test_an_interrupt_while_waiting_leaves_no_trace() -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    engine_lock = FairSemaphore()
    engine_lock.acquire()
    with pytest.raises(KeyboardInterrupt):
        engine_lock.acquire(given_up=interrupt)
    assert engine_lock.waiting == 0 and engine_lock.held == 1
    engine_lock.release()
    assert engine_lock.acquire(deadline=time.monotonic() + 1)


def test_a_thread_never_waits_for_itself() -> None:
    engine_lock = FairSemaphore(1, 0, own_first=True)
    assert engine_lock.acquire() and engine_lock.acquire() and engine_lock.held == 2
    engine_lock.release()
    engine_lock.release()
    assert engine_lock.held == 0


# -- answers -----------------------------------------------------------------------------------------------------------------------------


def test_8_threads_with_50_questions_each_get_the_serial_answers(qa: VideoQA) -> None:
    videos = [qa.open(SAMPLE), qa.open(SAMPLE, end=1.0)]
    want = {(i, q): v.ask(q).text for i, v in enumerate(videos) for q in QUESTIONS}
    wrong: list[tuple[str, str]] = []

    def work(seed: int) -> None:
        for n in range(50):
            i, q = (seed + n) % 2, QUESTIONS[(seed * 3 + n) % len(QUESTIONS)]
            if (text := videos[i].ask(q).text) != want[i, q]:
                wrong.append((q, text))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and qa.admission.held == qa.admission.waiting == qa.engine_lock.held == 0


def test_two_streams_take_turns_token_by_token(qa: VideoQA) -> None:
    """A long answer doesn't keep a short one waiting."""
    video, order, started = qa.open(SAMPLE), list[str](), threading.Barrier(2)

    def work(name: str) -> None:
        stream = video.stream("Describe the video.")
        started.wait()
        for _ in stream:
            order.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changes = sum(a != b for a, b in pairwise(order))
    assert changes > len(order) // 4, order


def test_many_streams_of_one_thread_may_be_open_at_once(qa: VideoQA) -> None:
    video = qa.open(SAMPLE)
    streams = [video.stream("Describe the video.") for _ in range(7)]  # more than places
    first = [next(stream) for stream in streams]
    assert len(set(first)) == 1 and qa.admission.held == 7
    rest = ["".join([piece, *stream]) for piece, stream in zip(first, streams)]
    assert set(rest) == {video.ask("Describe the video.").text} and qa.admission.held == 0


def test_closing_from_another_thread_stops_within_one_token() -> None:
    qa = VideoQA(device="cpu")
    video, pieces, closed = qa.open(SAMPLE), list[str](), threading.Event()
    stream = video.stream("Describe the video.")
    after = 0

    def work() -> None:
        nonlocal after
        for piece in stream:
            pieces.append(piece)
            after += closed.is_set()
            time.sleep(0.01)

    thread = threading.Thread(target=work)
    thread.start()
    assert wait_until(lambda: len(pieces) >= 2)
    stream.close()
    closed.set()
    thread.join(5)
    assert (
        after <= 1 and stream.answer.finish == "cancelled" and stream.answer.text and qa.admission.held == 0
    )


def test_closing_while_waiting_for_a_place() -> None:
    qa = VideoQA(device="cpu", parallel=1, queue=2)
    video = qa.open(SAMPLE)
    held = video.stream("Describe the video.")
    next(held)
    waiting = video.stream("Describe the video.")
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(waiting))
    thread.start()
    assert wait_until(lambda: qa.admission.waiting == 1)
    waiting.close()
    thread.join(5)
    assert not found and waiting.answer.finish == "cancelled" and waiting.answer.text == ""
    held.close()


def test_a_full_queue_and_a_timeout_in_it() -> None:
    qa = VideoQA(device="cpu", parallel=1, queue=1)
    video = qa.open(SAMPLE)
    held = video.stream("Describe the video.")
    next(held)
    errors: list[Exception] = []

    def late(timeout: float) -> None:
        try:
            video.ask("Describe the video.", timeout=timeout)
        except BusyError as error:
            errors.append(error)

    first, second = threading.Thread(target=late, args=(1.0,)), threading.Thread(target=late, args=(1.0,))
    first.start()
    assert wait_until(lambda: qa.admission.waiting == 1)
    second.start()
    second.join(5)
    assert "waiting already" in str(errors[0])
    first.join(10)
    assert "no turn came within 1 s" in str(errors[1])
    held.close()
    assert video.ask("What color is the circle?").text == "red"


def test_a_timeout_ends_an_answer_as_it_is(qa: VideoQA) -> None:
    video = qa.open(SAMPLE)
    stream = video.stream("Describe the video.", timeout=0.3)
    pieces = [next(stream), next(stream)]
    time.sleep(0.4)
    assert (
        list(stream) == []
        and stream.answer.finish == "timeout"
        and stream.answer.text == "".join(pieces).rstrip()
    )
    with pytest.raises(PromptError, match="timeout"):
        video.ask("Describe the video.", timeout=-1)


def test_an_abandoned_stream_gives_its_place_back() -> None:
    qa = VideoQA(device="cpu", parallel=1)
    video = qa.open(SAMPLE)

    def abandon() -> None:
        next(video.stream("Describe the video."))

    thread = threading.Thread(target=abandon)
    thread.start()
    thread.join()
    gc.collect()
    assert qa.admission.held == 0 and video.ask("What color is the circle?", timeout=20).text == "red"


# -- decoding ahead ------------------------------------------------------------------------------------------------------------------------


def test_ahead_gives_the_same_items_and_errors() -> None:
    assert list(prefetch(iter(range(100)), 3)) == list(range(100))

    def breaks() -> object:
        yield 1
        raise ValueError("no more")

    items = prefetch(breaks(), 2)  # type: ignore[arg-type]
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)


def test_ahead_stops_its_thread_when_it_is_closed() -> None:
    closed = threading.Event()

    def endless() -> object:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    items = prefetch(endless(), 2)  # type: ignore[arg-type]
    next(items)
    items.close()
    assert closed.is_set() and not any(t.name == "ppllava-frames" for t in threading.enumerate())
