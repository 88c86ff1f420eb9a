"""Answers, and the stream in which one comes: question → pooling → prefill → tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from ..engines.errors import BusyError, PromptError
from .lookup import Lookup
from .sampling import Sampling
from .scheduling import taking_turns
from .text import Detokenizer, stream_text

if TYPE_CHECKING:
    from .session import Video

MOST_MOMENTS = 5
STAGES = ("queue", "video_decode", "vision", "question", "select", "pooling", "prefill")  # before the first token


class Moment(NamedTuple):
    """When a frame is shown (seconds), and its share (0 to 1) of the attention that the question pays to the video."""

    seconds: float
    share: float


@dataclass
class Answer:
    """An answer and what it took.

    text: the answer. finish: "stop" (the model ended it), "length" (max_new_tokens or the context's end), "stop string", "cancelled" or "timeout".
    frame_indices, frame_times (seconds): the frames that were looked at. moments: those of them that the question attended to most, by share; empty
    where pooling isn't guided, and of answers that were closed early. visual_tokens, text_tokens, new_tokens: counts.
    timings: seconds for queue, video_decode, vision, question, select, pooling, prefill, first_token (all before the first token, together), generate
    (after it); video_decode and vision are 0 for every question after a video's first. notes: what people should know. engine: which of the bundle's
    ran. lookup: passes of the decoder after the first, tokens proposed and accepted, if it looked ahead.
    """

    question: str
    text: str
    model: str
    finish: str
    frame_indices: list[int]
    frame_times: list[float]
    visual_tokens: int
    text_tokens: int
    new_tokens: int
    timings: dict[str, float]
    notes: list[str] = field(default_factory=list)
    engine: str = "standard"
    lookup: dict[str, int] | None = None
    moments: list[Moment] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, the first (it belongs to prefill) left out; 0 if there was only one."""
        return (self.new_tokens - 1) / self.timings["generate"] if self.new_tokens > 1 and self.timings["generate"] > 0 else 0.0

    @property
    def time_to_first_token(self) -> dict[str, float | None]:
        """Seconds. first_ask: decoding and encoding the video included, None if this wasn't its first question; next_ask: without them."""
        once = self.timings["video_decode"] + self.timings["vision"]
        first = self.timings["first_token"]
        return {"first_ask": first if once else None, "next_ask": first - once}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        moments = [{"seconds": round(m.seconds, 3), "share": round(m.share, 4)} for m in self.moments]
        return {**vars(self), "moments": moments, "tokens_per_second": self.tokens_per_second, "time_to_first_token": self.time_to_first_token}

    def __str__(self) -> str:
        return self.text


class AskOptions(TypedDict, total=False):
    """What Video.ask takes beside the question, for calls that hand it on."""

    max_new_tokens: int
    sampling: Sampling | None
    stop: Sequence[str]
    look_ahead: bool
    timeout: float | None


@dataclass(frozen=True)
class Asking:
    """How a question is to be answered. stop: texts that end the answer. look_ahead: verify guessed tokens several in a pass (runtime/lookup.py).
    timeout: seconds after which the answer ends as it is ("timeout"); a question that is still waiting for its turn then raises BusyError."""

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    look_ahead: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise PromptError(f"max_new_tokens must be 1 or more, not {self.max_new_tokens}")
        if self.timeout is not None and not self.timeout > 0:
            raise PromptError(f"timeout must be above 0 seconds, not {self.timeout}")


def attended_moments(weights: np.ndarray, times: Sequence[float]) -> list[Moment]:
    """weights (T,rows,columns) of the patches → the frames with more than their even share, the highest first, at most 5."""
    shares = np.asarray(weights, np.float64).reshape(len(times), -1).sum(1)
    total = float(shares.sum())
    if not (np.isfinite(total) and total > 0):
        return []
    shares /= total
    best = [i for i in np.argsort(-shares, kind="stable").tolist() if shares[i] > 1 / len(times)]
    return [Moment(float(times[i]), float(shares[i])) for i in best[:MOST_MOMENTS]]


class AnswerStream:
    """Pieces of an answer as they come. close() ends it early, from any thread, within one token; `answer` holds what there is by then."""

    def __init__(self, video: Video, question: str, asking: Asking):
        self._video, self._question, self._asking = video, question, asking
        self._answer: Answer | None = None
        self._closed = threading.Event()
        self._deadline = None if asking.timeout is None else time.monotonic() + asking.timeout
        self._run: Generator[str, None, None] = self._generate()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._run)

    def close(self) -> None:
        """Stop generating. Safe while another thread takes pieces: that one finds the stream's end."""
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

    def _over(self) -> str:
        """Why the answer should end now: "cancelled", "timeout" or "" (go on)."""
        if self._closed.is_set():
            return "cancelled"
        return "timeout" if self._deadline is not None and time.monotonic() >= self._deadline else ""

    def _generate(self) -> Generator[str, None, None]:
        qa, started = self._video.qa, time.perf_counter()
        me = threading.get_ident()
        if not qa.places.acquire(self._deadline, self._closed.is_set):
            if not self._closed.is_set():
                raise BusyError(f"no turn came within {self._asking.timeout:g} s: {qa.places.held} questions are under way, {qa.places.waiting} waiting")
            self._answer = self._video.empty_answer(self._question, "cancelled")
            return
        try:
            yield from self._answer_in_turns(time.perf_counter() - started)
        finally:
            qa.places.release(me)

    def _answer_in_turns(self, queued: float) -> Generator[str, None, None]:
        video, qa, asking = self._video, self._video.qa, self._asking
        pipeline = qa.pipeline
        unspent = video.take_unspent()
        timings = {"queue": queued, **unspent}
        prepared = video.prepare(self._question, asking, timings, self._deadline, self._closed.is_set)
        if prepared is None:
            self._answer = video.empty_answer(self._question, "cancelled")
            return
        pooled = prepared.pooled
        stop_ids = pipeline.manifest.stop_ids
        lookup = Lookup(prepared.text_ids) if asking.look_ahead else None
        at = time.perf_counter()
        new_ids = prepared.generate(lookup)
        detokenizer = Detokenizer(lambda tokens: qa.text.tokenizer.decode(tokens, skip_special_tokens=True), asking.stop)
        count, text, finish, moments = 0, "", "length", list[Moment]()
        in_turns = taking_turns(new_ids, qa.turns, lambda: bool(self._over()))
        try:
            for token, piece in stream_text(in_turns, detokenizer, stop_ids):
                if token >= 0:
                    count += 1
                    if count == 1:
                        at = lap(timings, "prefill", at)
                        timings["first_token"] = sum(timings[stage] for stage in STAGES)
                    if token in stop_ids:
                        finish = "stop"
                piece = piece if text else piece.lstrip()
                if piece:
                    text += piece
                    yield piece
            if detokenizer.stopped:
                finish = "stop string"
            with qa.turns:
                moments = pooled.moments()
        finally:
            finish = self._over() if finish == "length" and count < asking.max_new_tokens and self._over() else finish
            new_ids.close()  # gives the cache back; takes no turn: an abandoned stream is collected anywhere, also by who has the turn
            timings.setdefault("prefill", 0.0)
            timings.setdefault("first_token", 0.0)
            notes = list(pooled.notes)
            if lookup is not None and lookup.note:
                notes.append(lookup.note)
            lap(timings, "generate", at)
            self._answer = Answer(
                self._question, text.rstrip(), qa.name, finish, list(pooled.indices), [round(t, 3) for t in pooled.times], len(pooled.visual),
                len(prepared.text_ids), count, timings, notes, pipeline.engine_name,
                {"passes": lookup.passes, "proposed": lookup.proposed, "accepted": lookup.accepted} if lookup and not lookup.note else None,
                moments,
            )  # fmt: skip
            prepared.finished(self._answer)
            qa.report("answer", {"finish": finish, "new_tokens": count, **timings})


@dataclass(frozen=True)
class Pooled:
    """A video, pooled for a question. visual (N,D): its visual tokens. indices, times (seconds): of the frames. moments: asked for after the last
    token, because on a GPU the weights have to come to the host."""

    visual: Any
    indices: list[int]
    times: list[float]
    moments: Callable[[], list[Moment]]
    notes: list[str]


@dataclass(frozen=True)
class Prepared:
    """A question, ready to be answered. text_ids: of the prompt, beside the visual tokens. generate: drafts or None → new token ids. finished: called
    with the answer."""

    pooled: Pooled
    text_ids: list[int]
    generate: Callable[[Lookup | None], Generator[int, None, None]]
    finished: Callable[[Answer], None] = lambda answer: None


def lap(timings: dict[str, float], name: str, since: float) -> float:
    """Note the seconds since then under a name; returns now."""
    now = time.perf_counter()
    timings[name] = now - since
    return now
