"""Answers in an event loop: streams, cancelled tasks, many at once, abandoned ones."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.commands import SAMPLE
from helpers.stream_server import wait_until
from ppllava_edge import BusyError, EngineError, PromptError, VideoQA

DESCRIBE, COLOR = "Describe the video.", "What color is the circle?"


@pytest.fixture(scope="module")
def qa() -> VideoQA:
    return VideoQA(device="cpu", parallel=2, queue=4)


def test_pieces_of_a_stream_while_other_tasks_run(qa: VideoQA) -> None:
    video = qa.open(SAMPLE)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    async def main() -> tuple[list[str], Any]:
        ticking, stream = asyncio.create_task(tick()), video.stream_async(DESCRIBE)
        with pytest.raises(PromptError, match="not finished"):
            _ = stream.answer
        pieces = [piece async for piece in stream]
        assert [piece async for piece in stream] == [], "once exhausted, it stays so"
        ticking.cancel()
        return pieces, stream.answer

    pieces, answer = asyncio.run(main())
    assert len(pieces) > 3 and "".join(pieces).rstrip() == answer.text == video.ask(DESCRIBE).text
    assert ticks > 1 and qa.admission.held == 0
    with pytest.raises(PromptError):
        video.stream_async("")


def test_leaving_cancelling_and_abandoning_a_stream_releases_its_slot(qa: VideoQA) -> None:
    video = qa.open(SAMPLE)

    async def main() -> None:
        async with video.stream_async(DESCRIBE) as stream:
            piece = await anext_of(stream)
        assert stream.answer.text.startswith(piece.rstrip()) and qa.admission.held == 0

        stream = video.stream_async(DESCRIBE)
        with qa.engine_lock.hold():  # another thread's long call
            task = asyncio.create_task(anext_of(stream))
            while not qa.engine_lock.waiting:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await stream.aclose()
        assert (stream.answer.finish, stream.answer.text) == ("cancelled", "")

        await anext_of(video.stream_async(DESCRIBE))
        gc.collect()
        while qa.admission.held:
            await asyncio.sleep(0.005)
        unbegun = video.stream_async(DESCRIBE)
        await unbegun.aclose()
        assert unbegun.answer.finish == "cancelled"

    asyncio.run(asyncio.wait_for(main(), 60))
    assert qa.admission.held == qa.admission.waiting == qa.engine_lock.held == 0


async def anext_of(stream: Any) -> str:
    """The next piece. (The function `anext` is a builtin from Python 3.10 on, without a coroutine's type.)"""
    piece: str = await stream.__anext__()
    return piece


def test_an_engine_error_reaches_the_task(qa: VideoQA, monkeypatch: pytest.MonkeyPatch) -> None:
    video, generate = qa.open(SAMPLE), qa.pipeline.generate

    def broken(*arguments: Any) -> Iterator[int]:
        tokens = generate(*arguments)
        yield next(tokens)
        raise EngineError("the GPU fell off the bus")

    monkeypatch.setattr(qa.pipeline, "generate", broken)

    async def main() -> str:
        stream = video.stream_async(DESCRIBE)
        with pytest.raises(EngineError, match="fell off"):
            async for _ in stream:
                pass
        with pytest.raises(EngineError, match="fell off"):
            await video.ask_async(DESCRIBE)
        return stream.answer.finish

    assert asyncio.run(main()) == "error" and qa.admission.held == 0


def test_an_error_after_a_stream_was_left_is_not_logged_by_asyncio(
    qa: VideoQA, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    video, generate = qa.open(SAMPLE), qa.pipeline.generate

    def broken(*arguments: Any) -> Iterator[int]:
        tokens = generate(*arguments)
        yield next(tokens)
        raise EngineError("the GPU fell off the bus")

    monkeypatch.setattr(qa.pipeline, "generate", broken)

    async def main() -> None:
        async with video.stream_async(DESCRIBE) as stream:
            await anext_of(stream)
            while qa.admission.held:
                await asyncio.sleep(0.005)
        assert stream.answer.finish == "error"

    asyncio.run(asyncio.wait_for(main(), 60))
    gc.collect()
    assert not caplog.records


def test_more_questions_than_places_are_refused_not_queued_elsewhere() -> None:
    """And a slow reader keeps nobody from being answered."""
    qa = VideoQA(device="cpu", parallel=1, queue=70)
    video = qa.open(SAMPLE)

    async def main() -> list[Any]:
        with video.stream(DESCRIBE) as held:
            next(held)
            tasks = [asyncio.create_task(video.ask_async(COLOR, 4)) for _ in range(80)]
            while sum(task.done() for task in tasks) < 10:
                await asyncio.sleep(0.005)
            assert qa.admission.waiting == 70
        slow = video.stream_async(DESCRIBE)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await anext_of(slow)
        answers.append(await video.ask_async(COLOR))
        with pytest.raises(EngineError, match="looking ahead needs"):
            await video.ask_async(COLOR, look_ahead=True)
        await slow.aclose()
        return answers

    answers = asyncio.run(asyncio.wait_for(main(), 120))
    refused = [answer for answer in answers if isinstance(answer, BusyError)]
    texts = [str(answer) for answer in answers if not isinstance(answer, BaseException)]
    assert len(refused) == 10 and texts == ["red"] * 71
    assert wait_until(lambda: qa.admission.held == 0)


def test_a_cancelled_task_ends_its_question_wherever_it_is(qa: VideoQA) -> None:
    video = qa.open(SAMPLE)

    async def main() -> None:
        for delay in (0, 0, 0.001, 0.01, 0.05):
            task = asyncio.create_task(video.ask_async(DESCRIBE))
            await asyncio.sleep(delay)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):  # it may have ended
                await task
        while qa.admission.held:
            await asyncio.sleep(0.005)
        assert (await video.ask_async(COLOR)).text == "red"

    asyncio.run(asyncio.wait_for(main(), 60))
    assert qa.admission.held == qa.admission.waiting == qa.engine_lock.held == 0
