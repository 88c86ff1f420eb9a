"""The stream in which an answer comes: admission → question tower → pooling → prefill → tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from ppllava_edge.engines.errors import BusyError, PromptError
from ppllava_edge.runtime.language.detokenizer import Detokenizer, stream_text
from ppllava_edge.runtime.language.prompt_lookup import PromptLookup
from ppllava_edge.runtime.session.admission import iterate_under_lock
from ppllava_edge.runtime.session.answer import (
    STAGES,
    Answer,
    GenerationOptions,
    Moment,
    record_elapsed,
)
from ppllava_edge.runtime.session.context import Session
from ppllava_edge.runtime.session.prepared import Askable, Patience, PreparedQuestion


class AnswerStream:
    """Pieces of an answer as they are generated: an iterator of strings.

    `close` ends it early, from any thread, within one token; `answer` then holds what was generated so far.
    """

    def __init__(self, session: Session, video: Askable, question: str, options: GenerationOptions):
        self._session, self._video, self._question, self._options = session, video, question, options
        self._answer: Answer | None = None
        self._closed = threading.Event()
        deadline = None if options.timeout is None else time.monotonic() + options.timeout
        self._patience = Patience(deadline, self._closed.is_set)
        self._run: Generator[str, None, None] = self._admit()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._run)

    def close(self) -> None:
        """Stop generating. Safe while another thread takes pieces: that thread's iteration ends."""
        self._closed.set()
        try:
            self._run.close()
        except ValueError:  # it is running in another thread, which sees the flag before its next token
            return

    @property
    def answer(self) -> Answer:
        """The finished answer. Raises PromptError while it is being generated."""
        if self._answer is None:
            raise PromptError("the answer is not finished: exhaust the stream, or close it, first")
        return self._answer

    def exhaust(self) -> Answer:
        """Generate to the end and return the answer."""
        for _ in self:
            pass
        return self.answer

    def _ended_early(self) -> str:
        """Why the answer should end now: "cancelled", "timeout" or "" (go on)."""
        if self._closed.is_set():
            return "cancelled"
        deadline = self._patience.deadline
        return "timeout" if deadline is not None and time.monotonic() >= deadline else ""

    def _admit(self) -> Generator[str, None, None]:
        """Wait for admission, answer, and release the slot."""
        admission, started, me = self._session.admission, time.perf_counter(), threading.get_ident()
        if not admission.acquire(self._patience.deadline, self._closed.is_set):
            if not self._closed.is_set():
                raise BusyError(
                    f"no slot became free within {self._options.timeout:g} s: {admission.held} questions are "
                    f"under way, {admission.waiting} waiting"
                )
            self._answer = self._video.empty_answer(self._question, "cancelled")
            return
        try:
            yield from self._prepare(time.perf_counter() - started)
        finally:
            admission.release(me)

    def _prepare(self, queued: float) -> Generator[str, None, None]:
        """Pool the video for the question, then generate. queued: seconds spent waiting for admission."""
        timings = {"queue": queued, **self._video.take_encoding_times()}
        prepared = self._video.prepare(self._question, self._options, timings, self._patience)
        if prepared is None:
            self._answer = self._video.empty_answer(self._question, "cancelled")
            return
        yield from self._generate(prepared, timings)

    def _generate(self, prepared: PreparedQuestion, timings: dict[str, float]) -> Generator[str, None, None]:
        """Prefill and decode, one token at a time under the engine lock, so that answers take turns."""
        session, options = self._session, self._options
        stop_ids = session.pipeline.manifest.stop_ids
        lookup = PromptLookup(prepared.text_ids) if options.look_ahead else None
        partial = _PartialAnswer(timings, time.perf_counter())
        new_ids = prepared.generate(lookup)
        detokenizer = Detokenizer(session.text.tokenizer.decode, options.stop)
        in_turns = iterate_under_lock(new_ids, session.engine_lock, lambda: bool(self._ended_early()))
        try:
            for token, piece in stream_text(in_turns, detokenizer, stop_ids):
                if token >= 0:
                    partial.count_token(ends=token in stop_ids)
                if piece := partial.add(piece):
                    yield piece
            if detokenizer.stopped:
                partial.finish = "stop string"
            with session.engine_lock:
                partial.moments = prepared.pooled.moments()
        finally:
            if partial.finish == "length" and partial.tokens < options.max_new_tokens:
                partial.finish = self._ended_early() or partial.finish
            # Returns the cache without taking a lock: an abandoned stream may be garbage-collected in any
            # thread, even in the one that holds the engine lock.
            new_ids.close()
            self._answer = self._finished(prepared, partial, lookup)
            prepared.finished(self._answer)
            session.report("answer", {"finish": partial.finish, "new_tokens": partial.tokens, **timings})

    def _finished(
        self, prepared: PreparedQuestion, partial: _PartialAnswer, lookup: PromptLookup | None
    ) -> Answer:
        pooled, timings = prepared.pooled, partial.timings
        timings.setdefault("prefill", 0.0)
        timings.setdefault("first_token", 0.0)
        record_elapsed(timings, "generate", partial.since)
        skipped = [lookup.note] if lookup is not None and lookup.note else []
        return Answer(
            question=self._question,
            text=partial.text.rstrip(),
            model=self._session.name,
            finish=partial.finish,
            frame_indices=list(pooled.indices),
            frame_times=[round(seconds, 3) for seconds in pooled.times],
            visual_tokens=len(pooled.visual),
            text_tokens=len(prepared.text_ids),
            new_tokens=partial.tokens,
            timings=timings,
            notes=[*pooled.notes, *skipped],
            engine=self._session.pipeline.engine_name,
            lookup=lookup.counts() if lookup is not None and not skipped else None,
            moments=partial.moments,
        )


@dataclass
class _PartialAnswer:
    """The answer so far, while it is generated. since: when the current stage began."""

    timings: dict[str, float]
    since: float
    text: str = ""
    tokens: int = 0
    finish: str = "length"
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
