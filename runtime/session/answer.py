"""Answers, and the stream in which one comes: question → pooling → prefill → tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from ppllava_edge.engines.errors import PromptError
from ppllava_edge.runtime.language.sampling import Sampling

if TYPE_CHECKING:
    pass

MAX_MOMENTS = 5
STAGES = (
    "queue",
    "video_decode",
    "vision",
    "question",
    "select",
    "pooling",
    "prefill",
)  # before the first token


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
        return (
            (self.new_tokens - 1) / self.timings["generate"]
            if self.new_tokens > 1 and self.timings["generate"] > 0
            else 0.0
        )

    @property
    def time_to_first_token(self) -> dict[str, float | None]:
        """Seconds. first_ask: decoding and encoding the video included, None if this wasn't its first question; next_ask: without them."""
        once = self.timings["video_decode"] + self.timings["vision"]
        first = self.timings["first_token"]
        return {"first_ask": first if once else None, "next_ask": first - once}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        moments = [{"seconds": round(m.seconds, 3), "share": round(m.share, 4)} for m in self.moments]
        return {
            **vars(self),
            "moments": moments,
            "tokens_per_second": self.tokens_per_second,
            "time_to_first_token": self.time_to_first_token,
        }

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
class GenerationOptions:
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
    return [Moment(float(times[i]), float(shares[i])) for i in best[:MAX_MOMENTS]]


def record_elapsed(timings: dict[str, float], name: str, since: float) -> float:
    """Note the seconds since then under a name; returns now."""
    now = time.perf_counter()
    timings[name] = now - since
    return now
