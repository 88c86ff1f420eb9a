"""A question that is asked periodically, in its own thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.runtime.session.answer import Answer
from ppllava_edge.runtime.session.answer_stream import AnswerStream

log = logging.getLogger(__name__)

MIN_EVERY = 0.01  # seconds between the questions of a watch


class Watch:
    """A question that is asked periodically until the watch is stopped.

    Args:
        question: The question.
        ask: Starts an answer from the live view's current window.
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
        ask: Callable[[], AnswerStream],
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
        self._thread = threading.Thread(target=self._run, name="ppllava-watch", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the watch is still running."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Stop asking; an answer under way ends within one token."""
        self._stopped.set()
        if self._stream is not None:
            self._stream.close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                self._ask_once()
            except PPLLaVAError as error:
                self.errors += 1
                if self._on_error is not None:
                    self._on_error(error)
                log.debug("watch: %s", error)
            except Exception:
                log.exception("a watch's callback failed")
            self._stopped.wait(max(self.every - (time.monotonic() - began), 0))

    def _ask_once(self) -> None:
        self._stream = self._ask()
        for _ in self._stream:
            if self._stopped.is_set():
                self._stream.close()
        if self._stopped.is_set():
            return
        answer = self._stream.answer
        self.answers += 1
        if self._on_answer is not None and not (self._changes_only and answer.text == self._last_text):
            self._on_answer(answer)
        self._last_text = answer.text
