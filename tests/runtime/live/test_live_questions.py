"""Questions to a live view: once, periodically, with asyncio."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from helpers.stream_server import wait_until
from ppllava_edge import MediaError, VideoQA

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
