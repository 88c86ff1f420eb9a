"""asyncio: answers are generated in threads, so that the event loop stays free."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ppllava_edge.runtime.session.answer import Answer
from ppllava_edge.runtime.session.answer_stream import AnswerStream

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")


def _start(call: Callable[[], T]) -> asyncio.Future[T]:
    """Start a function in a thread of its own.

    A pool of threads would be a second queue before admission: once it were full of questions that wait, the
    others would not even be refused, and those that a slot is free for could not run. The interpreter also
    waits for an executor's threads when it exits, before it closes the models that would end their calls.
    """
    import asyncio  # on first use: it takes 10 ms to import, and most apps have none

    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            settle = partial(_settle, result, call(), None)
        except BaseException as error:
            settle = partial(_settle, result, None, error)
        try:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
                loop.call_soon_threadsafe(settle)
        finally:
            del settle  # an error refers to this frame

    threading.Thread(target=run, name="ppllava-async", daemon=True).start()
    return result


def _settle(result: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    """Set a future's result or exception, unless it was cancelled."""
    if result.done():
        return
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)


async def in_thread(call: Callable[[], T]) -> T:
    """Call a function that blocks, in a thread of its own. Cancelling the task doesn't end the call."""
    return await _start(call)


async def finished(stream: AnswerStream) -> Answer:
    """Exhaust a stream in a thread and return its answer. Cancelling the task closes the stream."""
    try:
        return await in_thread(stream.exhaust)
    finally:
        stream.close()


class AsyncAnswerStream:
    """AnswerStream for asyncio: an asynchronous iterator of strings, and a context manager.

    A thread generates the answer from the first piece on, whether or not its pieces are taken (at most
    max_new_tokens of them wait), so a task that takes them slowly doesn't hold its slot longer. Cancelling
    the task that waits for a piece closes the stream.
    """

    def __init__(self, stream: AnswerStream):
        self._stream = stream
        self._pieces: asyncio.Queue[str | None] | None = None
        self._thread: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncAnswerStream:
        return self

    async def __anext__(self) -> str:
        if self._pieces is None or self._thread is None:
            self._pieces, self._thread = _generate(self._stream)
        try:
            piece = await self._pieces.get()
        except BaseException:  # cancelled
            self._stream.close()
            raise
        if piece is None:
            self._pieces.put_nowait(None)  # for the next call
            await self._thread  # raises what ended the answer
            raise StopAsyncIteration
        return piece

    @property
    def answer(self) -> Answer:
        """The finished answer.

        Raises:
            PromptError: While it is being generated.
        """
        return self._stream.answer

    async def aclose(self) -> None:
        """Stop generating, and wait until the answer has ended: for the engine's call under way."""
        import asyncio

        self._stream.close()
        if self._thread is not None:
            await asyncio.wait([self._thread])

    async def __aenter__(self) -> AsyncAnswerStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._stream.request_close()  # the thread that generates ends the answer


def _generate(stream: AnswerStream) -> tuple[asyncio.Queue[str | None], asyncio.Future[None]]:
    """Generate an answer in a thread.

    Returns:
        Its pieces, with None at the end, and the thread's end.
    """
    import asyncio

    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

    def generate() -> None:
        try:
            with stream:
                for piece in stream:
                    loop.call_soon_threadsafe(pieces.put_nowait, piece)
        finally:
            loop.call_soon_threadsafe(pieces.put_nowait, None)

    thread = _start(generate)
    # asyncio logs errors that nobody asks for, with a traceback: those of a stream that was left early
    thread.add_done_callback(lambda thread: thread.cancelled() or thread.exception())
    return pieces, thread
