"""Callbacks of a live view that raise, close it, or wait: its threads go on, and end when they should."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from helpers.commands import SAMPLE
from helpers.stream_server import wait_until
from ppllava_edge import BusyError, EngineError, MediaError, PromptError, VideoQA
from ppllava_edge.runtime.live.status import CLOSED, PLAYING, RECONNECTING, ViewState
from ppllava_edge.runtime.live.threads import Worker
from ppllava_edge.runtime.live.watch import Watch

QUESTION, ANSWER = "What color is the circle?", "red"


def raises(error: BaseException) -> Callable[..., None]:
    def callback(*args: Any) -> None:
        raise error

    return callback


FAILURES = [RuntimeError("the app's own mistake"), SystemExit(3), GeneratorExit(), MediaError("odd")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_watch_survives_callbacks_that_raise(
    qa: VideoQA, frames: np.ndarray, failure: BaseException
) -> None:
    with qa.live() as live:
        watch = live.watch(QUESTION, every=0.02, on_error=raises(failure), on_answer=raises(failure))
        assert wait_until(lambda: watch.errors >= 3), "no frame yet: on_error raises each time"
        live.push(frames[0])
        assert wait_until(lambda: watch.answers >= 3) and watch.running
    assert not watch.running


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_view_survives_callbacks_that_raise(frames: np.ndarray, failure: BaseException) -> None:
    qa = VideoQA(device="cpu", metrics=raises(failure))
    with qa.live(SAMPLE, fps=10, realtime=False, on_state=raises(failure)) as live:
        assert live.wait_for(15, 20) and wait_until(lambda: live.status.state == "ended")
        assert live.status.encoded >= 15 and not live.status.why


def test_errors_of_asking_reach_on_error_as_errors_of_ours(
    pushed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = []
    monkeypatch.setattr(pushed.qa.pipeline, "branch", raises(RuntimeError("onnxruntime said:\nno")))
    watch = pushed.watch(QUESTION, every=0.02, on_error=errors.append)
    assert wait_until(lambda: len(errors) >= 2) and watch.running
    assert isinstance(errors[0], EngineError)
    assert str(errors[0]) == "the question could not be answered: onnxruntime said:"


@pytest.mark.parametrize("where", ["on_state", "on_answer", "on_error", "metrics"])
def test_any_callback_may_close_the_view(
    frames: np.ndarray, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    views: list[Any] = []

    def close(*args: Any) -> None:
        if views:
            seen.append(views[0].status.state)
            views[0].close()
            views[0].close()

    qa = VideoQA(device="cpu", metrics=close if where == "metrics" else None)
    live = qa.live(on_state=close if where == "on_state" else None)
    watches = [
        live.watch(QUESTION, every=0.02, on_answer=close if where == "on_answer" else None, on_error=on_error)
        for on_error in ([close, close] if where == "on_error" else [None, None])
    ]
    views.append(live)
    if where == "on_state":  # it is called when a frame can't be encoded
        monkeypatch.setattr(qa.pipeline, "encode_trunk", raises(RuntimeError("broken")))
    if where != "on_error":
        live.push(frames[0])
    assert wait_until(lambda: live.closed and live.status.state == CLOSED), where
    assert wait_until(lambda: not any(watch.running for watch in watches)) and seen
    assert wait_until(lambda: not live._encoder._thread.is_alive())
    live.close()


def test_two_watches_may_stop_each_other(pushed: Any) -> None:
    watches: list[Watch] = []
    both = threading.Barrier(2)

    def stop_the_other(mine: int) -> Callable[[Any], None]:
        def stop(answer: Any) -> None:
            if watches[mine].answers == 1:  # the other may be gone when a second answer comes
                both.wait(10)
            watches[1 - mine].stop()

        return stop

    ready = threading.Lock()
    with ready:
        for i in range(2):
            watches.append(pushed.watch(QUESTION, every=0.01, on_answer=stop_the_other(i)))
    assert wait_until(lambda: not any(watch.running for watch in watches))


def test_states_are_reported_in_order_and_without_a_lock() -> None:
    """A callback asks for the state, changes it, and waits for a thread that changes it."""
    seen: list[tuple[str, str]] = []

    def on_state(name: str, why: str) -> None:
        seen.append((name, why))
        if name == RECONNECTING:
            state.change(PLAYING)
            other = threading.Thread(target=state.problem, args=("odd",))
            other.start()
            other.join(10)
            assert not other.is_alive() and state.now == (PLAYING, "odd")

    state = ViewState(PLAYING, lambda event, figures: None, on_state)
    state.change(RECONNECTING, "lost")
    assert seen == [(RECONNECTING, "lost"), (PLAYING, ""), (PLAYING, "odd")]
    state.change(PLAYING)
    assert seen[3:] == [], "a frame that arrives doesn't end the encoder's problem"
    state.problem("")
    assert state.begin_closing() and not state.begin_closing()
    state.change(PLAYING, "too late")
    state.change(CLOSED)
    assert seen[3:] == [(PLAYING, ""), (CLOSED, "")]


def test_states_of_many_threads_are_reported_once_each() -> None:
    seen: list[str] = []
    state = ViewState(PLAYING, lambda event, figures: None, lambda name, why: seen.append(why))
    threads = [
        threading.Thread(target=lambda i=i: [state.change(RECONNECTING, f"{i}.{n}") for n in range(100)])
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == sorted(f"{i}.{n}" for i in range(8) for n in range(100))
    for i in range(8):
        own = [int(why.split(".")[1]) for why in seen if why.startswith(f"{i}.")]
        assert own == list(range(100))


def test_a_push_view_recovers_from_a_frame_that_cannot_be_encoded(
    qa: VideoQA, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[tuple[str, str]] = []
    with qa.live(fps=1000, on_state=lambda *state: states.append(state)) as live:
        with monkeypatch.context() as broken:
            broken.setattr(qa.pipeline, "encode_trunk", raises(RuntimeError("no memory\nat all")))
            live.push(frames[0], 0.0)
            assert wait_until(lambda: live.status.why == "a frame could not be encoded: no memory")
            live.push(frames[0], 1.0)
            assert wait_until(lambda: live._encoder.failed == 2)
        live.push(frames[0], 2.0)
        assert live.wait_for(1, 20) and wait_until(lambda: live.status.why == "")
    assert states == [(PLAYING, "a frame could not be encoded: no memory"), (PLAYING, ""), (CLOSED, "")]


def test_a_broken_encoder_is_logged_once(
    qa: VideoQA, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), qa.live(fps=1000) as live, monkeypatch.context() as broken:
        broken.setattr(qa.pipeline, "encode_trunk", raises(RuntimeError("broken")))
        for i in range(20):
            live.push(frames[0], float(i), wait=True)
        assert wait_until(lambda: live._encoder.failed == 20)
    assert len(caplog.records) == 1, "not one traceback for each frame"


def test_a_dropped_view_ends(qa: VideoQA) -> None:
    live = qa.live(SAMPLE, fps=10)
    threads = [live._encoder._thread, live._reader._thread] if live._reader else []
    gone = weakref.ref(live)
    assert live.wait_for(1, 20) and len(threads) == 2
    del live
    gc.collect()
    assert gone() is None
    assert wait_until(lambda: not any(thread.is_alive() for thread in threads))


def test_watches_are_bounded_and_none_starts_while_the_view_closes(qa: VideoQA, frames: np.ndarray) -> None:
    live = qa.live()
    watches = [live.watch(QUESTION, every=100) for _ in range(64)]
    with pytest.raises(BusyError, match="64 watches are running"):
        live.watch(QUESTION)
    watches[0].stop()
    live.watch(QUESTION, every=100).stop()
    started: list[Watch] = []

    def start_many() -> None:
        while True:
            try:
                started.append(live.watch(QUESTION, every=100))
            except BusyError:
                time.sleep(0)
            except MediaError:
                return

    for watch in watches:
        watch.stop()
    threads = [threading.Thread(target=start_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: len(started) >= 8)
    live.close()
    for thread in threads:
        thread.join(10)
    assert not any(watch.running for watch in (*watches, *started))


def test_stopping_a_watch_that_waits_for_the_engine(pushed: Any, frames: np.ndarray) -> None:
    with pushed.qa.engine_lock.hold():
        pushed._snapshot = None
        watch = pushed.watch(QUESTION, every=0.01)
        time.sleep(0.1)
        watch.stop()
    assert not watch.running and watch.answers == watch.errors == 0


@pytest.mark.parametrize(
    ("arguments", "words", "error"),
    [
        ({"every": 0}, "every must be from 0.01", MediaError),
        ({"every": float("nan")}, "every must be a finite number", MediaError),
        ({"every": float("inf")}, "every must be a finite number", MediaError),
        ({"every": 1e300}, "every must be from 0.01", MediaError),
        ({"every": "5"}, "every must be a finite number, not '5'", MediaError),
        ({"every": None}, "every must be a finite number, not None", MediaError),
        ({"last": 0}, "last must be above 0", MediaError),
        ({"last": float("nan")}, "last must be a finite number", MediaError),
        ({"last": "2"}, "last must be a finite number", MediaError),
        ({"on_answer": "print"}, "on_answer must be a function", MediaError),
        ({"on_error": 5}, "on_error must be a function", MediaError),
        ({"question": " "}, "the question is empty", PromptError),
        ({"question": None}, "the question must be a string", PromptError),
        ({"stop": [""]}, "a stop string must have", PromptError),
        ({"max_new_tokens": 0}, "max_new_tokens must be", PromptError),
    ],
)
def test_a_watch_that_could_never_answer_is_refused(
    pushed: Any, arguments: dict[str, Any], words: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=words):
        pushed.watch(**{"question": QUESTION, **arguments})
    assert pushed._watches == []


def test_a_worker_does_not_wait_for_another() -> None:
    """Not even for itself."""
    ended: list[bool] = []
    first: Worker
    second = Worker(lambda: ended.append(True), "second")
    second.wait_for_end()  # not started: nothing to wait for

    def wait_for_itself() -> None:
        first.wait_for_end()
        ended.append(True)

    first = Worker(wait_for_itself, "first")
    first.start()
    first.wait_for_end(10)
    assert ended == [True] and not first.is_alive()


def test_the_encoder_may_push_from_its_own_callback(frames: np.ndarray) -> None:
    """push(wait=True) in the metrics callback, which runs in the thread that would make room."""
    times = iter(range(1, 100))
    views: list[Any] = []

    def push(event: str, figures: dict[str, Any]) -> None:
        if event == "frame" and views and views[0].status.encoded < 5:
            views[0].push(frames[0], float(next(times)), wait=True)
            views[0].push(frames[0], float(next(times)), wait=True)

    with VideoQA(device="cpu", metrics=push).live(fps=1000) as live:
        views.append(live)
        live.push(frames[0], 0.0)
        assert live.wait_for(5, 20)


def test_a_metrics_callback_that_exits_ends_no_watch(frames: np.ndarray) -> None:
    def metrics(event: str, figures: dict[str, Any]) -> None:
        raise SystemExit(f"at {event}")

    qa, answers = VideoQA(device="cpu", metrics=metrics), list[str]()
    with qa, qa.live() as live:
        live.push(frames[0], 0.0)
        assert live.wait_for(1, 60)
        watch = live.watch(
            "What color is the circle?", every=0.01, on_answer=lambda a: answers.append(a.text)
        )
        assert wait_until(lambda: len(answers) > 2) and watch.running


def test_the_status_may_be_asked_for_by_a_signals_handler(pushed: Any) -> None:
    """It runs between any two lines of the main thread, also while that holds one of our locks."""
    kept: list[int] = []

    def handled() -> None:
        with pushed.window._lock, pushed._state._changed, pushed._encoder._slot._changed:
            kept.append(pushed.status.kept)

    thread = threading.Thread(target=handled, daemon=True)
    thread.start()
    thread.join(30)
    assert kept == [8]
