"""Answers, their timings, and the options of generation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

import numpy as np

from ppllava_edge.engines.errors import PromptError
from ppllava_edge.runtime.language.detokenizer import stop_strings
from ppllava_edge.runtime.language.numbers import finite_number, integer
from ppllava_edge.runtime.language.sampling import Sampling

MAX_MOMENTS = 5
MAX_TIMEOUT = 1e9  # seconds; locks refuse to wait much longer
# The timed stages up to the first token.
STAGES = ("queue", "video_decode", "vision", "question", "select", "pooling", "prefill")


class Moment(NamedTuple):
    """A frame that the question attends to.

    Attributes:
        seconds: When the frame is shown.
        share: Its share of the attention over the video, 0 to 1.
    """

    seconds: float
    share: float


@dataclass
class Answer:
    """An answer, with timings and token counts.

    Attributes:
        question: The question, cleaned.
        text: The answer.
        model: The model's name.
        finish: Why generation ended: "stop" (a stop token), "length" (max_new_tokens or the end of the
            context), "stop string", "cancelled" (closed, abandoned or interrupted), "timeout" or "error" (the
            stream raised it).
        frame_indices: Numbers of the frames that the model saw.
        frame_times: When they are shown, seconds.
        visual_tokens: Tokens of the pooled video.
        text_tokens: Tokens of the rest of the prompt.
        new_tokens: Tokens of the answer.
        timings: Seconds of each stage: queue, video_decode, vision, question, select, pooling, prefill; their
            sum first_token; generate (after the first token). video_decode and vision are 0 from a video's
            second question on.
        notes: Warnings, such as a truncated question.
        engine: Which of the bundle's engines ran.
        lookup: With look_ahead: counts of decoder passes after the first, of drafted and of accepted tokens.
        moments: The frames that the question attended to most, highest share first. Empty if pooling isn't
            guided, or the answer was closed early.
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
        """Tokens per second after the first, which belongs to prefill; 0 if there are no others."""
        seconds = self.timings["generate"]
        return (self.new_tokens - 1) / seconds if self.new_tokens > 1 and seconds > 0 else 0.0

    @property
    def time_to_first_token(self) -> dict[str, float | None]:
        """Seconds to the first token.

        Returns:
            first_ask: With decoding and encoding the video; None if this wasn't its first question.
            next_ask: Without them. Both are None for an answer that ended before its first token.
        """
        encoding = self.timings["video_decode"] + self.timings["vision"]
        first = self.timings["first_token"]
        if not first:
            return {"first_ask": None, "next_ask": None}
        return {"first_ask": first if encoding else None, "next_ask": first - encoding}

    def as_dict(self) -> dict[str, Any]:
        """The attributes and the derived figures, for JSON."""
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
    """Keyword arguments of Video.ask, for functions that pass them on."""

    max_new_tokens: int
    sampling: Sampling | None
    stop: str | Sequence[str]
    look_ahead: bool
    timeout: float | None


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate an answer.

    Attributes:
        max_new_tokens: Tokens at most.
        sampling: Temperature and the like; greedy by default.
        stop: A text that ends the answer, or several.
        look_ahead: Draft tokens from the prompt and verify several in a pass (language/prompt_lookup.py).
        timeout: Seconds after which the answer ends with finish "timeout"; a question that still waits for
            admission then raises BusyError. None: no limit.

    Raises:
        PromptError: For max_new_tokens below 1, a timeout of 0 or less, unusable stop texts, wrong types.
    """

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: str | Sequence[str] = ()
    look_ahead: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "max_new_tokens": integer("max_new_tokens", self.max_new_tokens, 1),
            "stop": stop_strings(self.stop),
        }
        if self.timeout is not None:
            checked["timeout"] = min(finite_number("timeout", self.timeout), MAX_TIMEOUT)
            if checked["timeout"] <= 0:
                raise PromptError(f"timeout must be above 0 seconds, not {self.timeout}")
        if not isinstance(self.sampling, Sampling):
            raise PromptError(f"sampling must be a Sampling, not {type(self.sampling).__name__}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen for everybody else


def attended_moments(weights: np.ndarray, times: Sequence[float]) -> list[Moment]:
    """Find the frames that a question attends to.

    Args:
        weights: (T, rows, columns), pooling weights of the patches.
        times: When the T frames are shown, seconds.

    Returns:
        The frames with more than an even share of the weights, highest share first, at most 5.
    """
    shares = np.asarray(weights, np.float64).reshape(len(times), -1).sum(1)
    total = float(shares.sum())
    if not (np.isfinite(total) and total > 0):
        return []
    shares /= total
    even_share = 1 / len(times)
    best = [i for i in np.argsort(-shares, kind="stable").tolist() if shares[i] > even_share]
    return [Moment(float(times[i]), float(shares[i])) for i in best[:MAX_MOMENTS]]


def record_elapsed(timings: dict[str, float], name: str, since: float) -> float:
    """Record the seconds since then.

    Args:
        timings: Takes the seconds.
        name: Their key.
        since: By time.perf_counter().

    Returns:
        The time now, as the start of the next stage.
    """
    now = time.perf_counter()
    timings[name] = now - since
    return now
