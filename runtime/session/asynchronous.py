"""asyncio twins: the work goes on in threads, the event loop stays free."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from ppllava_edge.runtime.session.answer import Answer
from ppllava_edge.runtime.session.answer_stream import AnswerStream

_THREADS = 64  # that may wait for answers at once; the engine's queue decides who runs


class _Pool:
    executor: ThreadPoolExecutor | None = None


def _executor() -> ThreadPoolExecutor:
    """Threads of our own: asyncio's few would all be waiting in the queue."""
    if _Pool.executor is None:
        _Pool.executor = ThreadPoolExecutor(_THREADS, "ppllava-async")
    return _Pool.executor


async def finished(stream: AnswerStream) -> Answer:
    """Exhaust a stream in a thread. Cancelling closes it."""

    try:
        await asyncio.get_running_loop().run_in_executor(_executor(), stream.exhaust)
    except asyncio.CancelledError:
        stream.close()
        raise
    return stream.answer
