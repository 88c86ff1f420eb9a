"""The stream in which an answer comes: turn → admission → question tower → pooling → prefill → tokens."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType

from ppllava_edge.engines.errors import BusyError, EngineError, PromptError
from ppllava_edge.runtime.language.detokenizer import Detokenizer, stream_text
from ppllava_edge.runtime.language.prompt_lookup import PromptLookup
from ppllava_edge.runtime.session.admission import EndedEarly, Holder, Patience, Slot, iterate_under_lock
from ppllava_edge.runtime.session.answer import (
    STAGES,
    Answer,
    GenerationOptions,
    Moment,
    record_elapsed,
)
from ppllava_edge.runtime.session.context import Session
from ppllava_edge.runtime.session.prepared import Askable, PreparedQuestion


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
        self._run.check_process()  # before any lock
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
        if not self._run.closed.is_set() or self._run.forked or not self._lock.acquire(blocking=False):
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
        with self:  # an interrupt may come between two pieces
            for _ in self:
                pass
        return self.answer

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AnswerRun:
    """The state that an AnswerStream and the generator of its pieces share.

    It refers to neither, and the generator doesn't refer to the stream. So a stream that nobody refers to any
    more ends at once: its generator is closed, which releases the slot.

    Args:
        session: The model.
        video: What the question is about.
        question: The question, cleaned.
        options: How to answer it; its timeout begins now.

    Attributes:
        closed: Set to end the answer early.
        holder: The thread that takes the pieces.
        answer: The answer, once it is finished.
    """

    def __init__(self, session: Session, video: Askable, question: str, options: GenerationOptions):
        self._session, self._video, self._question, self._options = session, video, question, options
        self.closed = closed = threading.Event()
        self.holder = Holder()
        self.answer: Answer | None = None
        self._patience = Patience(options.timeout, lambda: closed.is_set() or session.closed)

    @property
    def forked(self) -> bool:
        """Whether this is a forked child, where the stream can neither go on nor be ended."""
        return self._session.forked

    def check_process(self) -> None:
        """Raise EngineError in a forked child."""
        self._session.check_process()

    def cancel_unbegun(self) -> None:
        """Set the answer of a question that was closed before it began."""
        self.answer = self._video.empty_answer(self._question, "cancelled")

    def pieces(self) -> Generator[str, None, None]:
        """Answer the question.

        Yields:
            Pieces of the answer's text. `answer` is set at the end, however the answer ends.

        Raises:
            BusyError: If it was not admitted.
            EngineError: If the engine fails, or the model was closed before the question was admitted.
            PromptError: If the prompt is too long.
        """
        partial, abandoned = _PartialAnswer(), False
        try:
            yield from self._admit(partial)
        except EndedEarly as ended:
            partial.finish = ended.finish
        except GeneratorExit:
            partial.finish = partial.finish or "cancelled"
            abandoned = not self.closed.is_set()
            raise
        except KeyboardInterrupt:
            partial.finish = "cancelled"
            raise
        except EngineError:
            # After admission, a model that was closed between two calls of the engine cancels the answer.
            was_closed = self._session.closed and "queue" in partial.timings
            partial.finish = "cancelled" if was_closed else "error"
            if not was_closed:
                raise
        except BaseException:
            partial.finish = "error"
            raise
        finally:
            self.answer = self._finished(partial)
            figures = {"finish": partial.finish, "new_tokens": partial.tokens, **self.answer.timings}
            # A stream may be garbage-collected while its thread is inside the app's metrics callback.
            (self._session.report_later if abandoned else self._session.report)("answer", figures)

    def _admit(self, partial: _PartialAnswer) -> Generator[str, None, None]:
        """Wait for the chat's turn, then for admission: a question that waits for its turn holds no slot."""
        self._session.check_usable()
        with self._turn(), self._admission():
            record_elapsed(partial.timings, "queue", partial.since)
            yield from self._prepare(partial)

    def _turn(self) -> contextlib.AbstractContextManager[object]:
        """Wait for the chat's turn."""
        try:
            return self._video.turn(self._patience, self.holder)
        except EndedEarly:
            self._check_open()
            raise

    def _check_open(self) -> None:
        """Raise EngineError if the model was closed while the question waited, and not the stream itself."""
        if not self.closed.is_set():
            self._session.check_usable()

    def _admission(self) -> Slot:
        """Wait for admission."""
        admission = self._session.admission
        slot = admission.acquire(self._patience, self.holder)
        if slot is not None:
            return slot
        self._check_open()
        if self.closed.is_set():
            raise EndedEarly("cancelled")
        raise BusyError(
            f"no slot became free within {self._options.timeout:g} s: {admission.held} questions are "
            f"under way, {admission.waiting} waiting"
        )

    def _prepare(self, partial: _PartialAnswer) -> Generator[str, None, None]:
        """Pool the video for the question, then generate."""
        partial.timings |= self._video.take_encoding_times()
        partial.prepared = self._video.prepare(self._question, self._options, partial.timings, self._patience)
        yield from self._generate(partial, partial.prepared)

    def _generate(self, partial: _PartialAnswer, prepared: PreparedQuestion) -> Generator[str, None, None]:
        """Prefill and decode, one token at a time under the engine lock, so that answers take turns."""
        session, options, patience = self._session, self._options, self._patience
        stop_ids = session.pipeline.manifest.stop_ids
        partial.since = time.perf_counter()
        partial.lookup = PromptLookup(prepared.text_ids) if options.look_ahead else None
        detokenizer = Detokenizer(session.text.tokenizer.decode, options.stop)
        # Closing the generator returns the KV cache without taking a lock of ours: an abandoned stream may be
        # garbage-collected in any thread, even in the one that holds the engine lock.
        with contextlib.closing(prepared.generate(partial.lookup)) as new_ids:
            in_turns = iterate_under_lock(new_ids, session.engine_lock, patience)
            for token, piece in stream_text(in_turns, detokenizer, stop_ids):
                if token >= 0:
                    partial.count_token(ends=token in stop_ids)
                if piece := partial.add(piece):
                    yield piece
        if detokenizer.stopped:
            partial.finish = "stop string"
        if not partial.finish and partial.tokens < options.max_new_tokens:
            partial.finish = patience.ended()
        with contextlib.suppress(EndedEarly), patience.hold(session.engine_lock):
            partial.moments = prepared.pooled.moments()
        partial.finish = partial.finish or "length"

    def _finished(self, partial: _PartialAnswer) -> Answer:
        answer, prepared, lookup = self._empty(partial), partial.prepared, partial.lookup
        if prepared is None:
            return answer
        record_elapsed(answer.timings, "generate", partial.since)
        skipped = [lookup.note] if lookup is not None and lookup.note else []
        return replace(
            answer,
            text=partial.text.rstrip(),
            frame_indices=list(prepared.pooled.indices),
            frame_times=[round(seconds, 3) for seconds in prepared.pooled.times],
            visual_tokens=len(prepared.pooled.visual),
            text_tokens=len(prepared.text_ids),
            new_tokens=partial.tokens,
            notes=[*prepared.pooled.notes, *skipped],
            lookup=lookup.counts() if lookup is not None and not skipped else None,
            moments=partial.moments,
        )

    def _empty(self, partial: _PartialAnswer) -> Answer:
        """The answer before its first token, with the times so far."""
        answer = self._video.empty_answer(self._question, partial.finish)
        answer.timings |= partial.timings
        return answer


@dataclass
class _PartialAnswer:
    """The answer so far, while it is generated. since: when the current stage began. finish: "": not yet."""

    timings: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)
    prepared: PreparedQuestion | None = None
    lookup: PromptLookup | None = None
    text: str = ""
    tokens: int = 0
    finish: str = ""
    moments: list[Moment] = field(default_factory=list)

    def count_token(self, ends: bool) -> None:
        """Count a token; the first one ends prefill. ends: whether it is a stop id."""
        self.tokens += 1
        if self.tokens == 1:
            self.since = record_elapsed(self.timings, "prefill", self.since)
            self.timings["first_token"] = sum(self.timings[stage] for stage in STAGES)
        if ends:
            self.finish = "stop"

    def add(self, piece: str) -> str:
        """Append a piece of text, without white space at the answer's start. Returns what was appended."""
        piece = piece if self.text else piece.lstrip()
        self.text += piece
        return piece
