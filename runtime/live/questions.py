"""Questions to a live view: asked once or periodically."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from ppllava_edge.engines.errors import MediaError, PPLLaVAError
from ppllava_edge.runtime.live.watch import MIN_EVERY, Watch
from ppllava_edge.runtime.session.answer import Answer, AskOptions
from ppllava_edge.runtime.session.answer_stream import AnswerStream
from ppllava_edge.runtime.session.asynchronous import finished
from ppllava_edge.runtime.session.video import Video

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger(__name__)


class LiveQuestions(ABC):
    """The part of a live view that answers questions."""

    def __init__(self) -> None:
        self._watches: list[Watch] = []

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether the view was closed."""

    @abstractmethod
    def wait_for(self, frames: int = 1, timeout: float | None = None) -> bool:
        """Block until `frames` frames were encoded. Returns whether they were."""

    @abstractmethod
    def video(self, last: float | None = None, frames: int | None = None) -> Video:
        """The window's frames as a Video."""

    def stream(
        self,
        question: str,
        last: float | None = None,
        frames: int | None = None,
        wait: float = 0.0,
        **asking: Unpack[AskOptions],
    ) -> AnswerStream:
        """`ask`, as an iterator of text pieces; `answer` is set once it is exhausted or closed."""
        if wait:
            self.wait_for(1, wait)
        return self.video(last, frames).stream(question, **asking)

    def ask(
        self,
        question: str,
        last: float | None = None,
        frames: int | None = None,
        wait: float = 0.0,
        **asking: Unpack[AskOptions],
    ) -> Answer:
        """Answer a question about the window's frames.

        Args:
            question: The question in natural language.
            last: Seconds to look back from the newest frame; None: the whole window.
            frames: How many the model sees, evenly spaced; None: its default.
            wait: Seconds to wait for the first frame.
            asking: max_new_tokens, sampling, stop, look_ahead, timeout: see Video.ask.

        Returns:
            The answer, with timings and token counts.

        Raises:
            MediaError: If no frame was encoded yet.
            PromptError, EngineError, BusyError: See Video.ask.
        """
        return self.stream(question, last, frames, wait, **asking).exhaust()

    async def ask_async(
        self,
        question: str,
        last: float | None = None,
        frames: int | None = None,
        wait: float = 0.0,
        **asking: Unpack[AskOptions],
    ) -> Answer:
        """`ask` for asyncio. Cancelling the task ends the answer within one token."""
        stream = await asyncio.to_thread(self.stream, question, last, frames, wait, **asking)
        return await finished(stream)

    def watch(
        self,
        question: str,
        every: float = 5.0,
        on_answer: Callable[[Answer], None] | None = None,
        *,
        last: float | None = None,
        changes_only: bool = False,
        on_error: Callable[[PPLLaVAError], None] | None = None,
        **asking: Unpack[AskOptions],
    ) -> Watch:
        """Ask the same question periodically, in a thread, until the watch is stopped or the view closed.

        Args:
            question: The question in natural language.
            every: Seconds between questions. An answer that takes longer delays the next; none pile up.
            on_answer: Called with each answer, in the watch's thread.
            last: Seconds to look back from the newest frame; None: the whole window.
            changes_only: Call on_answer only when the text differs from the last answer's.
            on_error: Called with errors (no frame yet, engine busy); the watch continues.
            asking: As for `ask`.

        Returns:
            The running watch.

        Raises:
            MediaError: If the view is closed, or `every` is too short.
        """
        if self.closed:
            raise MediaError("the live view is closed; open another one")
        if not every >= MIN_EVERY:
            raise MediaError(f"every must be {MIN_EVERY:g} seconds or more, not {every:g}")

        def ask() -> AnswerStream:
            return self.stream(question, last, **asking)

        watch = Watch(question, ask, every, on_answer, changes_only, on_error)
        self._watches = [w for w in self._watches if w.running] + [watch]
        return watch

    async def watch_async(
        self,
        question: str,
        every: float = 5.0,
        *,
        last: float | None = None,
        changes_only: bool = False,
        **asking: Unpack[AskOptions],
    ) -> AsyncIterator[Answer]:
        """`watch` for asyncio: `async for answer in live.watch_async(…)`. Ends when the view is closed."""
        last_text: str | None = None
        while not self.closed:
            began = time.monotonic()
            try:
                answer = await self.ask_async(question, last, wait=every, **asking)
            except MediaError as error:  # no frame was encoded yet
                log.debug("%s", error)
            else:
                if not (changes_only and answer.text == last_text):
                    last_text = answer.text
                    yield answer
            await asyncio.sleep(max(every - (time.monotonic() - began), 0))

    def _stop_watches(self) -> None:
        for watch in self._watches:
            watch.stop()
