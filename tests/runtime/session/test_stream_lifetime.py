"""Streams that are abandoned, closed from other threads, late, or cut off by an error."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.commands import SAMPLE
from helpers.stream_server import wait_until
from ppllava_edge import BusyError, EngineError, PromptError, VideoQA
from ppllava_edge.runtime.session.answer_stream import AnswerRun
from ppllava_edge.runtime.session.video import Video

DESCRIBE, COLOR = "Describe the video.", "What color is the circle?"


def in_thread(work: Any) -> threading.Thread:
    """The thread that runs this, started."""
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def serial(parallel: int = 1, queue: int = 4, **options: Any) -> tuple[VideoQA, Video]:
    """A model that answers one question at a time, and a video."""
    qa = VideoQA(device="cpu", parallel=parallel, queue=queue, **options)
    return qa, qa.open(SAMPLE)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the cyclic garbage collector: only reference counts free objects."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_an_abandoned_stream_releases_its_slot_with_its_last_reference(no_collector: None) -> None:
    qa, video = serial(queue=0)
    for piece in video.stream(DESCRIBE):
        assert piece
        break
    assert qa.admission.held == 0
    answers: list[str] = []
    in_thread(lambda: answers.append(video.ask(COLOR).text)).join()
    assert answers == ["red"]


def test_a_stream_is_a_context_manager() -> None:
    qa, video = serial()
    with video.stream(DESCRIBE) as stream:
        piece = next(stream)
    assert stream.answer.finish == "cancelled" and stream.answer.text == piece.rstrip()
    with pytest.raises(ZeroDivisionError), video.stream(DESCRIBE) as stream:
        next(stream)
        _ = 1 / 0
    assert qa.admission.held == 0 and stream.answer.finish == "cancelled"


def test_a_stream_closed_before_it_began_has_an_answer() -> None:
    events: list[tuple[str, str]] = []
    qa, video = serial(metrics=lambda event, figures: events.append((event, figures.get("finish", ""))))
    stream = video.stream(DESCRIBE)
    with pytest.raises(PromptError, match="not finished"):
        _ = stream.answer
    stream.close()
    assert (stream.answer.finish, stream.answer.text, list(stream)) == ("cancelled", "", [])
    assert stream.exhaust() is stream.answer and qa.admission.held == 0
    assert events == [("open", "")], "a question that never began is none"


def test_closing_from_another_thread_never_fails_in_either() -> None:
    qa, video = serial(parallel=2)
    errors: list[BaseException] = []
    for n in range(150):
        stream = video.stream(DESCRIBE)
        begun = threading.Event()

        def take(stream: Any = stream, begun: threading.Event = begun) -> None:
            try:
                for _ in stream:
                    begun.set()
            except BaseException as error:
                errors.append(error)
            begun.set()

        thread = in_thread(take)
        begun.wait(10)
        time.sleep(0.0005 * (n % 7))
        stream.close()
        assert stream.answer.finish in ("cancelled", "stop")  # available at once: it waits for the last call
        thread.join(10)
    assert not errors and qa.admission.held == qa.engine_lock.held == 0


def test_threads_may_share_a_stream() -> None:
    qa, video = serial()
    stream, pieces, errors = video.stream(DESCRIBE), list[str](), list[BaseException]()

    def take() -> None:
        try:
            pieces.extend(stream)
        except BaseException as error:
            errors.append(error)

    for thread in [in_thread(take) for _ in range(4)]:
        thread.join(20)
    letters, wanted = ("".join(text).replace(" ", "") for text in (pieces, stream.answer.text))
    assert not errors and sorted(letters) == sorted(wanted), "each piece reaches one thread"
    assert qa.admission.held == 0


def test_a_callback_may_close_or_ask() -> None:
    """The answer's event comes after its slot was released."""
    streams: list[Any] = []
    answers: list[str] = []

    def callback(event: str, figures: dict[str, Any]) -> None:
        if event == "answer" and streams:
            stream = streams.pop()
            stream.close()
            answers.append(stream.answer.finish)
            with pytest.raises(PromptError, match="callback"):
                next(stream)
            answers.append(video.ask(COLOR).text)

    qa, video = serial(queue=0, metrics=callback)
    streams.append(video.stream(DESCRIBE))
    stream = streams[0]
    assert stream.exhaust().finish == "stop" and answers == ["stop", "red"] and qa.admission.held == 0


def test_slots_are_never_exceeded() -> None:
    qa, video = serial(parallel=2, queue=4)
    streams = [video.stream(DESCRIBE) for _ in range(2)]
    first = [next(stream) for stream in streams]
    began = time.monotonic()
    with pytest.raises(BusyError, match=r"this thread has 2 unfinished answers.*`with"):
        video.ask(COLOR)
    assert qa.admission.held == 2 and qa.admission.waiting == 0 and time.monotonic() - began < 5
    assert {piece + "".join(stream) for piece, stream in zip(first, streams)} == {video.ask(DESCRIBE).text}


def test_a_stream_handed_to_another_thread_is_that_threads() -> None:
    """The thread that took its last piece holds its slot: the first one may wait again."""
    qa, video = serial()
    stream, took, answers = video.stream(DESCRIBE), threading.Event(), list[str]()
    next(stream)

    def work() -> None:
        next(stream)
        took.set()
        wait_until(lambda: qa.admission.waiting == 1)
        with pytest.raises(BusyError, match="1 unfinished answer"):
            video.ask(COLOR)
        answers.append(stream.exhaust().finish)

    thread = in_thread(work)
    assert took.wait(10)
    assert video.ask(COLOR).text == "red"
    thread.join(10)
    assert answers == ["stop"] and qa.admission.held == 0


def test_an_engine_error_is_the_answers_finish_and_the_consumers_exception(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[dict[str, Any]] = []
    qa, video = serial(metrics=lambda event, figures: events.append(figures))
    generate = qa.pipeline.generate

    def broken(*arguments: Any) -> Iterator[int]:
        for n, token in enumerate(generate(*arguments)):
            if n == 3:
                raise EngineError("the GPU fell off the bus")
            yield token

    monkeypatch.setattr(qa.pipeline, "generate", broken)
    stream, pieces = video.stream(DESCRIBE), list[str]()
    with pytest.raises(EngineError, match="fell off"):
        for piece in stream:
            pieces.append(piece)
    assert stream.answer.finish == events[-1]["finish"] == "error"
    assert stream.answer.text == "".join(pieces).rstrip() and stream.answer.new_tokens == 3
    monkeypatch.undo()

    def broken_tower(*arguments: Any) -> Any:
        raise EngineError("no question tower today")

    monkeypatch.setattr(qa.pipeline, "encode_question", broken_tower)
    stream = video.stream(DESCRIBE)
    with pytest.raises(EngineError, match="today"):
        next(stream)
    assert (stream.answer.finish, stream.answer.text, events[-1]["finish"]) == ("error", "", "error")
    monkeypatch.undo()
    assert video.ask(COLOR).text == "red" and qa.admission.held == qa.engine_lock.held == 0


@pytest.mark.parametrize("when", ["before pooling", "before a token"])
@pytest.mark.parametrize("how", ["timeout", "cancelled"])
def test_waiting_for_the_engine_ends(when: str, how: str) -> None:
    qa, video = serial()
    stream, pieces = video.stream(DESCRIBE, timeout=1000 if how == "timeout" else None), list[str]()
    if when == "before a token":
        pieces.append(next(stream))
    if how == "timeout":
        stream._run._patience.deadline = time.monotonic() + 0.1
    done = threading.Event()

    def take() -> None:
        pieces.extend(stream)
        done.set()

    with qa.engine_lock.hold():  # another thread's long call
        thread = in_thread(take)
        if how == "cancelled":
            assert wait_until(lambda: qa.engine_lock.waiting == 1)
            stream.close()
        assert done.wait(10), "it waits for the engine"
    thread.join(10)
    assert stream.answer.finish == how and stream.answer.text == "".join(pieces).rstrip()
    assert (len(pieces) > 0) == (when == "before a token")
    assert qa.admission.held == qa.engine_lock.held == qa.engine_lock.waiting == 0


def test_a_timeout_is_seen_between_the_calls_of_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    qa, video = serial()
    called: list[str] = []
    encode = qa.pipeline.encode_question

    def slow(*arguments: Any) -> Any:
        time.sleep(0.4)
        return encode(*arguments)

    def pool(*arguments: Any) -> Any:
        called.append("pooling")
        raise AssertionError("pooled after the timeout")

    monkeypatch.setattr(qa.pipeline, "encode_question", slow)
    monkeypatch.setattr(qa.pipeline, "visual_tokens", pool)
    answer = video.ask(DESCRIBE, timeout=0.2)
    assert (answer.finish, answer.text, answer.new_tokens, called) == ("timeout", "", 0, [])
    assert answer.timings["question"] > 0.3 and qa.engine_lock.held == qa.admission.held == 0


def test_an_interrupt_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    qa, video = serial()
    generate = qa.pipeline.generate

    def interrupted(*arguments: Any) -> Iterator[int]:
        tokens = generate(*arguments)
        yield next(tokens)
        raise KeyboardInterrupt

    monkeypatch.setattr(qa.pipeline, "generate", interrupted)
    stream = video.stream(DESCRIBE)
    with pytest.raises(KeyboardInterrupt):
        stream.exhaust()
    monkeypatch.undo()
    assert stream.answer.finish == "cancelled" and stream.answer.new_tokens == 1
    assert video.ask(COLOR).text == "red" and qa.admission.held == qa.engine_lock.held == 0


def test_an_interrupt_between_two_pieces_frees_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while something keeps the interrupt, and with it the stream, as an interactive Python does."""
    qa, video = serial(queue=0)
    taken = itertools.count()

    def interrupted(run: AnswerRun) -> None:
        if next(taken) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerRun, "check_process", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        video.ask(DESCRIBE)
    assert kept.value.__traceback__ is not None and qa.admission.held == 0
    assert video.ask(COLOR).text == "red"


def test_a_stream_in_a_reference_cycle_is_collected_anywhere() -> None:
    """Its event reaches the app with the next one, not from inside the garbage collector."""
    inside, events = threading.Lock(), list[str]()

    def callback(event: str, figures: dict[str, Any]) -> None:
        assert inside.acquire(blocking=False), "called inside the app's own callback"
        gc.collect()
        events.append(figures.get("finish", event))
        inside.release()

    qa, video = serial(parallel=2, metrics=callback)
    cycle: dict[str, Any] = {"stream": video.stream(DESCRIBE)}
    cycle["itself"] = cycle
    next(cycle["stream"])
    del cycle
    assert video.ask(COLOR).text == "red"  # its callback collects the stream
    assert qa.admission.held == 0
    video.ask(COLOR)
    assert events == ["open", "stop", "cancelled", "stop"]
