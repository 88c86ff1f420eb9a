"""Questions to a live view: asked once or periodically."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from ppllava_edge.engines.errors import BusyError, EngineError, MediaError, PPLLaVAError
from ppllava_edge.runtime.language.numbers import finite_number
from ppllava_edge.runtime.language.sampling import Sampling
from ppllava_edge.runtime.language.text_processor import clean_question
from ppllava_edge.runtime.live.watch import MAX_EVERY, MIN_EVERY, Watch
from ppllava_edge.runtime.session.admission import EndedEarly, Patience
from ppllava_edge.runtime.session.answer import MAX_TIMEOUT, Answer, AskOptions, GenerationOptions
from ppllava_edge.runtime.session.answer_stream import AnswerStream
from ppllava_edge.runtime.session.asynchronous import AsyncAnswerStream, finished, in_thread
from ppllava_edge.runtime.session.context import Session
from ppllava_edge.runtime.session.video import Video

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger(__name__)
MAX_WATCHES = 64  # of one view; each has a thread
POLL = 0.2  # seconds between looks at whether the view was closed


class LiveQuestions(ABC):
    """The part of a live view that answers questions.

    Attributes:
        qa: The model.
    """

    qa: Session

    def __init__(self) -> None:
        self._watches: list[Watch] = []
        self._watches_lock = threading.RLock()  # re-entrant: a destructor may close the view in any thread

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether the view was closed."""

    @abstractmethod
    def video(self, last: float | None = None, frames: int | None = None) -> Video:
        """The window's frames as a Video."""

    @abstractmethod
    def _wait_for(self, frames: int, timeout: float | None, cancelled: Callable[[], bool]) -> bool:
        """`wait_for`, which ends early once `cancelled` holds and `_wake` was called."""

    @abstractmethod
    def _wake(self) -> None:
        """Wake all threads in `_wait_for`."""

    @abstractmethod
    def _video(self, last: float | None, frames: int | None, patience: Patience) -> Video:
        """`video`, which waits for the engine as long as `patience` says. Raises EndedEarly."""

    def stream(
        self,
        question: str,
        last: float | None = None,
        frames: int | None = None,
        wait: float = 0.0,
        **asking: Unpack[AskOptions],
    ) -> AnswerStream:
        """`ask`, as an iterator of text pieces; `answer` is set once it is exhausted or closed."""
        return self._begin(question, last, frames, wait, lambda: False, asking)

    def _begin(
        self,
        question: str,
        last: float | None,
        frames: int | None,
        wait: float,
        cancelled: Callable[[], bool],
        asking: AskOptions,
    ) -> AnswerStream:
        """`stream`; once `cancelled` holds, it raises BusyError instead of waiting."""
        question, options = clean_question(question), _options(asking)
        wait = min(finite_number("wait", wait, MediaError), MAX_TIMEOUT)
        if wait > 0:
            self._wait_for(1, wait, cancelled)
        patience = Patience(options.timeout, cancelled)
        try:
            video = self._video(last, frames, patience)
        except EndedEarly as ended:
            if ended.finish == "timeout":
                raise BusyError(f"the engine was busy for {options.timeout:g} s: try again later") from None
            raise BusyError("the question was cancelled while it waited") from None
        left = None if patience.deadline is None else max(patience.deadline - time.monotonic(), 1e-9)
        return video.stream(
            question, options.max_new_tokens, options.sampling, options.stop, options.look_ahead, left
        )

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
            asking: max_new_tokens, sampling, stop, look_ahead, timeout: see Video.ask. The timeout begins
                when there is a frame.

        Returns:
            The answer, with timings and token counts.

        Raises:
            MediaError: If no frame was encoded yet, or an argument can't be used.
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
        """`ask` for asyncio. Cancelling the task ends waiting at once, and the answer within one token."""
        return await finished(await self._begin_async(question, last, frames, wait, asking))

    async def stream_async(
        self,
        question: str,
        last: float | None = None,
        frames: int | None = None,
        wait: float = 0.0,
        **asking: Unpack[AskOptions],
    ) -> AsyncAnswerStream:
        """`stream` for asyncio: `async for piece in await live.stream_async(…)`."""
        return AsyncAnswerStream(await self._begin_async(question, last, frames, wait, asking))

    async def _begin_async(
        self, question: str, last: float | None, frames: int | None, wait: float, asking: AskOptions
    ) -> AnswerStream:
        cancelled = threading.Event()
        try:
            return await in_thread(
                lambda: self._begin(question, last, frames, wait, cancelled.is_set, asking)
            )
        except asyncio.CancelledError:
            cancelled.set()
            self._wake()
            raise

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
            MediaError: If the view is closed, or an argument can't be used.
            PromptError: If the question is empty, or the options can't be used.
            BusyError: If 64 watches are running.
        """
        every = self._check_watch(question, every, last, asking)
        for name, callback in (("on_answer", on_answer), ("on_error", on_error)):
            if callback is not None and not callable(callback):
                raise MediaError(f"{name} must be a function, not of type {type(callback).__name__}")

        def ask(cancelled: Callable[[], bool]) -> AnswerStream:
            return self._begin(question, last, None, 0.0, cancelled, asking)

        with self._watches_lock:
            if self.closed:
                raise MediaError("the live view is closed; open another one")
            self._watches = [w for w in self._watches if w.running]
            if len(self._watches) >= MAX_WATCHES:
                raise BusyError(f"{MAX_WATCHES} watches are running; stop one first")
            watch = Watch(question, ask, every, on_answer, changes_only, on_error)
            self._watches.append(watch)
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
        """`watch` for asyncio: `async for answer in live.watch_async(…)`.

        Ends when the view or the model is closed. Goes on while there is no frame, or the engine is busy.

        Raises:
            MediaError, PromptError, EngineError: As `watch` and `ask`.
        """
        every = self._check_watch(question, every, last, asking)
        last_text: str | None = None
        while not self.closed:
            began = time.monotonic()
            try:
                answer = await self.ask_async(question, last, wait=every, **asking)
            except (MediaError, BusyError) as error:  # no frame was encoded yet, or try again later
                log.debug("%s", error)
            except EngineError:
                if not self.qa.closed:
                    raise
                return
            else:
                if self.qa.closed and answer.finish == "cancelled":
                    return
                if not (changes_only and answer.text == last_text):
                    last_text = answer.text
                    yield answer
            while not self.closed and (pause := began + every - time.monotonic()) > 0:
                await asyncio.sleep(min(pause, POLL))

    def _check_watch(self, question: str, every: float, last: float | None, asking: AskOptions) -> float:
        """Check what would make every question of a watch fail. Returns `every`."""
        every = finite_number("every", every, MediaError)
        if not MIN_EVERY <= every <= MAX_EVERY:
            raise MediaError(f"every must be from {MIN_EVERY:g} to {MAX_EVERY:g} seconds, not {every:g}")
        clean_question(question)
        check_last(last)
        _options(asking)
        return every

    def _stop_watches(self, until: float | None) -> None:
        """Stop all watches, then wait for their threads, until then (time.monotonic()) at most."""
        with self._watches_lock:
            watches = list(self._watches)
        for wait in (False, True):
            for watch in watches:
                watch.stop(wait, until)


def check_last(last: float | None) -> None:
    """Raise MediaError unless `last`, in seconds, can be looked back."""
    if last is not None and finite_number("last", last, MediaError) <= 0:
        raise MediaError(f"last must be above 0 seconds, not {last:g}")


def _options(asking: AskOptions) -> GenerationOptions:
    """Keyword arguments of `ask`, checked. Raises PromptError."""
    given: dict[str, Any] = {**asking, "sampling": asking.get("sampling") or Sampling()}
    return GenerationOptions(**given)
