"""asyncio: answers are generated in threads, so that the event loop stays free."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from ppllava_edge.runtime.session.answer import Answer
from ppllava_edge.runtime.session.answer_stream import AnswerStream

T = TypeVar("T")
MAX_THREADS = 64  # answers generated or queued at once; admission decides which of them run


@cache
def _executor() -> ThreadPoolExecutor:
    """Our own threads: queued answers would occupy all of asyncio's default ones."""
    return ThreadPoolExecutor(MAX_THREADS, "ppllava-async")


async def in_thread(call: Callable[[], T]) -> T:
    """Call a function that blocks, in a thread. Cancelling the task doesn't end the call."""
    import asyncio  # on first use: it takes 10 ms to import, and most apps have none

    return await asyncio.get_running_loop().run_in_executor(_executor(), call)


async def finished(stream: AnswerStream) -> Answer:
    """Exhaust a stream in a thread and return its answer. Cancelling the task closes the stream."""
    import asyncio

    try:
        await in_thread(stream.exhaust)
    except asyncio.CancelledError:
        stream.close()
        raise
    return stream.answer
