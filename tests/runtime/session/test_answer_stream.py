"""Answers that share an engine: fair turns, bounded admission, timeouts, cancellation from any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from helpers.commands import SAMPLE
from helpers.stream_server import wait_until
from ppllava_edge import BusyError, PromptError, VideoQA

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


@pytest.mark.slow
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


def test_two_streams_take_turns_token_by_token(qa: VideoQA, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer doesn't keep a short one waiting."""
    video, started = qa.open(SAMPLE), threading.Barrier(2)
    order: list[str] = []
    generate = qa.pipeline.generate

    def slow(*arguments: Any) -> Iterator[int]:
        for token in generate(*arguments):
            time.sleep(0.005)  # under the engine lock: the other thread queues up, also on a busy machine
            yield token

    monkeypatch.setattr(qa.pipeline, "generate", slow)

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
    """As many as there are slots."""
    video = qa.open(SAMPLE)
    streams = [video.stream("Describe the video.") for _ in range(4)]
    first = [next(stream) for stream in streams]
    assert len(set(first)) == 1 and qa.admission.held == 4
    rest = ["".join([piece, *stream]) for piece, stream in zip(first, streams)]
    assert set(rest) == {video.ask("Describe the video.").text} and qa.admission.held == 0


def test_closing_from_another_thread_stops_within_one_token() -> None:
    qa = VideoQA(device="cpu")
    stream = qa.open(SAMPLE).stream("Describe the video.")
    pieces: list[str] = []
    closed = threading.Event()
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
    assert after <= 1 and stream.answer.finish == "cancelled" and stream.answer.text
    assert qa.admission.held == 0


def test_closing_while_waiting_for_admission() -> None:
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


def test_a_full_queue_and_a_timeout_while_waiting() -> None:
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
    assert "no slot became free within 1 s" in str(errors[1])
    held.close()
    assert video.ask("What color is the circle?").text == "red"


def test_a_timeout_returns_the_partial_answer(qa: VideoQA) -> None:
    video = qa.open(SAMPLE)
    stream = video.stream("Describe the video.", timeout=0.3)
    pieces = [next(stream), next(stream)]
    time.sleep(0.4)
    assert list(stream) == [] and stream.answer.finish == "timeout"
    assert stream.answer.text == "".join(pieces).rstrip()
    with pytest.raises(PromptError, match="timeout"):
        video.ask("Describe the video.", timeout=-1)
