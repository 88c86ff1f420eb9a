"""Questions to a live view: once, periodically, with asyncio."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from typing import Any

import numpy as np
import pytest

from helpers.stream_server import wait_until
from ppllava_edge import BusyError, MediaError, PromptError, VideoQA

QUESTION, ANSWER = "What color is the circle?", "red"


def test_a_question_runs_only_the_stages_it_needs(qa: VideoQA, pushed: Any) -> None:
    first, second = pushed.ask(QUESTION), pushed.ask("How many objects are there?")
    assert first.text == ANSWER and second.text == "three"
    assert first.timings["vision"] > 0 and first.timings["video_decode"] == 0
    assert pushed.ask(QUESTION, last=1.0).frame_times == [1.0, 1.25, 1.5, 1.75]
    assert len(pushed.ask(QUESTION, frames=4).frame_times) == 4
    again = pushed.video()
    assert again.features is pushed.video().features, "without a new frame, features are reused"


def test_a_watch_asks_periodically(pushed: Any) -> None:
    answers: list[str] = []
    watch = pushed.watch(QUESTION, every=0.05, on_answer=lambda a: answers.append(a.text))
    assert wait_until(lambda: len(answers) >= 3)
    watch.stop()
    count = len(answers)
    time.sleep(0.2)
    assert len(answers) == count and set(answers) == {ANSWER} and not watch.running
    changes: list[str] = []
    with_changes = pushed.watch(
        QUESTION, every=0.02, on_answer=lambda a: changes.append(a.text), changes_only=True
    )
    assert wait_until(lambda: with_changes.answers >= 4)
    with_changes.stop()
    assert changes == [ANSWER]


def test_a_watch_survives_errors_and_callbacks_that_fail(qa: VideoQA, frames: np.ndarray) -> None:
    errors: list[Exception] = []

    def fails(answer: Any) -> None:
        raise RuntimeError("the app's own mistake")

    with qa.live() as live:
        watch = live.watch(QUESTION, every=0.02, on_error=errors.append, on_answer=fails)
        assert wait_until(lambda: len(errors) >= 2) and isinstance(errors[0], MediaError)
        live.push(frames[0])
        assert wait_until(lambda: watch.answers >= 2)
    assert not watch.running, "closing the view stops its watches"


def test_asyncio(pushed: Any) -> None:
    async def main() -> tuple[str, list[str], bool]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        answer = await pushed.ask_async("Describe the video.")
        watched = []
        async for found in pushed.watch_async(QUESTION, every=0.02):
            watched.append(found.text)
            if len(watched) == 3:
                break
        ticking.cancel()
        task = asyncio.create_task(pushed.ask_async("Describe the video."))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return answer.text, watched, ticks > 5

    text, watched, ticked = asyncio.run(main())
    assert text.startswith("a red circle moves right") and watched == [ANSWER] * 3 and ticked


@pytest.mark.parametrize("when", ["before", "while it is answered"])
def test_closing_the_model_ends_an_asynchronous_watch(frames: np.ndarray, when: str) -> None:
    """Without an error, and without a part of an answer."""
    qa = VideoQA(device="cpu")
    live = qa.live()
    live.push(frames[0], 0.0)
    assert live.wait_for(1, 60)

    async def main() -> int:
        count = 0
        async for answer in live.watch_async(QUESTION, every=0.01):
            assert answer.text == ANSWER
            count += 1
            if when == "before":
                qa._closed = True  # a question may come before the view is closed
                threading.Timer(0.2, live.close).start()
            else:
                closing.start()
        return count

    def close_while_a_question_runs() -> None:
        with qa.engine_lock.hold():
            assert wait_until(lambda: qa.admission.held > 0 and qa.engine_lock.waiting > 0)
            qa.close()

    closing = threading.Thread(target=close_while_a_question_runs)
    assert asyncio.run(asyncio.wait_for(main(), 60)) == 1


def test_a_snapshot_that_is_asked_twice_counts_its_encoding_once(pushed: Any) -> None:
    first, second = pushed.ask(QUESTION, last=1.0), pushed.ask(QUESTION, last=1.0)
    assert first.timings["vision"] > 0 == second.timings["vision"]
    assert first.time_to_first_token["first_ask"] and second.time_to_first_token["first_ask"] is None
    assert first.text == second.text == ANSWER


def test_the_timeout_counts_waiting_for_the_engine(pushed: Any) -> None:
    with pushed.qa.engine_lock.hold():
        asking = threading.Thread(target=lambda: errors.append(error_of(pushed)))
        errors: list[Exception] = []
        asking.start()
        asking.join(10)
        assert not asking.is_alive(), "it waits for the engine although its time is over"
    assert isinstance(errors[0], BusyError) and "the engine was busy for 0.1 s" in str(errors[0])
    assert pushed.ask(QUESTION, timeout=60).text == ANSWER


def error_of(live: Any) -> Exception:
    try:
        live.ask(QUESTION, last=1.0, timeout=0.1)
    except BusyError as error:
        return error
    raise AssertionError("the engine is held by another thread")


def test_cancelling_a_task_ends_its_waiting(qa: VideoQA) -> None:
    async def main() -> None:
        task = asyncio.create_task(live.ask_async(QUESTION, wait=1000))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def waiting() -> bool:
        stacks = [traceback.walk_stack(frame) for frame in sys._current_frames().values()]
        return any(frame.f_code.co_name == "_wait_for" for stack in stacks for frame, _ in stack)

    with qa.live() as live:
        asyncio.run(main())
        assert wait_until(lambda: not waiting(), 30), "no thread waits for a frame any more"


def test_watching_with_asyncio_goes_on_while_the_engine_is_busy(
    pushed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch, failures = (
        pushed.qa.pipeline.branch,
        [BusyError("later"), MediaError("nothing"), BusyError("later")],
    )

    def sometimes_busy(states: Any) -> Any:
        if failures:
            raise failures.pop()
        return branch(states)

    async def main() -> list[str]:
        watched = []
        async for answer in pushed.watch_async(QUESTION, every=0.01):
            watched.append(answer.text)
            if len(watched) == 3:
                break
        return watched

    monkeypatch.setattr(pushed.qa.pipeline, "branch", sometimes_busy)
    assert asyncio.run(main()) == [ANSWER] * 3 and not failures


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"every": float("nan")}, MediaError),
        ({"every": 0}, MediaError),
        ({"last": -1}, MediaError),
        ({"stop": 5}, PromptError),
        ({"timeout": 0}, PromptError),
    ],
)
def test_watching_with_asyncio_what_could_never_be_answered(
    pushed: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    async def main() -> None:
        async for _ in pushed.watch_async(QUESTION, **options):
            pass

    with pytest.raises(error):
        asyncio.run(main())


def test_watching_with_asyncio_ends_with_the_view(qa: VideoQA, frames: np.ndarray) -> None:
    async def main(question: str, every: float) -> list[str]:
        return [answer.text async for answer in live.watch_async(question, every=every)]

    live = qa.live()
    live.push(frames[0])
    assert live.wait_for(1, 20)
    threading.Timer(0.3, live.close).start()
    began = time.monotonic()
    assert asyncio.run(main(QUESTION, 1000)) == [ANSWER]
    assert time.monotonic() - began < 60, "it doesn't sleep until the next question"
