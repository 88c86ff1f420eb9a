"""A question that is asked periodically, in its own thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ppllava_edge.engines.errors import EngineError, PPLLaVAError
from ppllava_edge.runtime.live.threads import Worker, one_line
from ppllava_edge.runtime.session.answer import Answer
from ppllava_edge.runtime.session.answer_stream import AnswerStream
from ppllava_edge.runtime.session.callbacks import call_app

log = logging.getLogger(__name__)

MIN_EVERY, MAX_EVERY = 0.01, 1e6  # seconds between the questions of a watch


class Watch:
    """A question that is asked periodically until the watch is stopped.

    Args:
        question: The question.
        ask: Starts an answer from the live view's current window, unless the function it is given says that
            nobody waits for the answer any more.
        every: Seconds between questions. An answer that takes longer delays the next; none pile up.
        on_answer: Called with each answer, in the watch's thread.
        changes_only: Call on_answer only when the text differs from the last answer's.
        on_error: Called with errors (no frame yet, engine busy); the watch continues.

    Attributes:
        question, every: As given.
        answers, errors: Counts so far.
    """

    def __init__(
        self,
        question: str,
        ask: Callable[[Callable[[], bool]], AnswerStream],
        every: float,
        on_answer: Callable[[Answer], None] | None,
        changes_only: bool,
        on_error: Callable[[PPLLaVAError], None] | None,
    ):
        self.question = question
        self.every = every
        self.answers = self.errors = 0
        self._ask, self._changes_only = ask, changes_only
        self._on_answer, self._on_error = on_answer, on_error
        self._stopped = threading.Event()
        self._stream: AnswerStream | None = None
        self._last_text: str | None = None
        self._thread = Worker(self._run, "ppllava-watch")
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the watch is still running."""
        return self._thread.is_alive()

    def stop(self, wait: bool = True, until: float | None = None) -> None:
        """Stop asking; an answer under way ends within one token. May be called twice, and in any callback.

        Args:
            wait: Wait for the thread's end. In callbacks of watches and views, it isn't waited for.
            until: Until then at most, by time.monotonic(); None: no limit.
        """
        self._stopped.set()
        stream = self._stream
        if stream is not None:
            stream.close()
        if wait:
            self._thread.wait_for_end(until)

    def _run(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                self._ask_once()
            except PPLLaVAError as error:
                self._failed(error)
            except Exception as error:
                log.exception("the watch %r failed to ask", self.question)
                self._failed(EngineError(f"the question could not be answered: {one_line(error)}"))
            self._stopped.wait(max(self.every - (time.monotonic() - began), 0))

    def _failed(self, error: PPLLaVAError) -> None:
        if self._stopped.is_set():
            return
        self.errors += 1
        log.debug("watch: %s", error)
        if self._on_error is not None:
            call_app("on_error", self._on_error, error)

    def _ask_once(self) -> None:
        self._stream = stream = self._ask(self._stopped.is_set)
        try:
            if self._stopped.is_set():  # `stop` may have come before there was a stream to close
                stream.close()
                return
            answer = stream.exhaust()
        finally:
            self._stream = None
        if self._stopped.is_set():
            return
        self.answers += 1
        changed, self._last_text = answer.text != self._last_text, answer.text
        if self._on_answer is not None and (changed or not self._changes_only):
            call_app("on_answer", self._on_answer, answer)
