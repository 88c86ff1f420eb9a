"""The stream in which an answer comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType

from ppllava_edge.engines.errors import PromptError
from ppllava_edge.runtime.session.answer import Answer, GenerationOptions
from ppllava_edge.runtime.session.answer_run import AnswerRun
from ppllava_edge.runtime.session.context import Session
from ppllava_edge.runtime.session.prepared import Askable


class AnswerStream:
    """Pieces of an answer as they are generated: an iterator of strings, and a context manager.

    The question is admitted when the first piece is taken. Its slot is released when the answer ends, when
    the stream is closed, or with the last reference to the stream. `with video.stream(…) as stream:` closes
    it in any case.

    Safe to use from several threads, each of which gets other pieces. A stream may be handed from one thread
    to another; the one that took its last piece holds its slot.
    """

    def __init__(self, session: Session, video: Askable, question: str, options: GenerationOptions):
        self._run = AnswerRun(session, video, question, options)
        self._pieces = self._run.pieces()
        self._lock = threading.RLock()  # held by the thread that runs the generator
        self._is_running = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            with self._lock:
                if self._is_running:
                    raise PromptError("a callback can't take pieces of the answer that it is called for")
                self._run.holder.move_here()
                self._is_running = True
                try:
                    return next(self._pieces)
                finally:
                    self._is_running = False
        finally:
            self._end_if_closed()  # close() in another thread may have left it to this one

    def close(self) -> None:
        """Stop generating. Returns at once, from any thread, also from a callback.

        While another thread takes a piece, that thread ends the answer: after the engine's call under way, or
        within 50 ms if it waits. Then its iteration ends.
        """
        self._run.closed.set()
        self._end_if_closed()

    def request_close(self) -> None:
        """`close`, but leave everything to the thread that takes pieces. Safe from a destructor."""
        self._run.closed.set()

    def _end_if_closed(self) -> None:
        """Close the generator if `close` was called, unless a thread is running it: that one calls this."""
        if not self._run.closed.is_set() or not self._lock.acquire(blocking=False):
            return
        try:
            if self._is_running:  # close() was called by a callback
                return
            self._pieces.close()
            if self._run.answer is None:
                self._run.cancel_unbegun()
        finally:
            self._lock.release()

    @property
    def answer(self) -> Answer:
        """The finished answer. After `close`, waits for the engine's call under way.

        Raises:
            PromptError: While it is being generated.
        """
        if self._run.answer is None and self._run.closed.is_set():
            with self._lock:
                self._end_if_closed()
        if self._run.answer is None:
            raise PromptError("the answer is not finished: exhaust the stream, or close it, first")
        return self._run.answer

    def exhaust(self) -> Answer:
        """Generate to the end and return the answer."""
        for _ in self:
            pass
        return self.answer

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
