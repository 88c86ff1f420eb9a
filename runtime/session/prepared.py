"""A question on its way to the decoder: the video pooled for it, and how its tokens are generated."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

from ppllava_edge.runtime.language.prompt_lookup import PromptLookup
from ppllava_edge.runtime.session.answer import Answer, GenerationOptions, Moment


@dataclass(frozen=True)
class PooledVideo:
    """A video, pooled for a question.

    Attributes:
        visual: Visual tokens (N, D).
        indices, times: The frames that were pooled, and when they are shown (seconds).
        moments: Returns the moments that the question attended to. Called after the last token, because on a
            GPU the weights have to come to the host.
        notes: Notes for the user.
    """

    visual: Any
    indices: list[int]
    times: list[float]
    moments: Callable[[], list[Moment]]
    notes: list[str]


@dataclass(frozen=True)
class PreparedQuestion:
    """A question, ready to be answered.

    Attributes:
        pooled: The video, pooled for it.
        text_ids: Token ids of the prompt, beside the visual tokens.
        generate: Drafts or None → new token ids.
        finished: Called with the answer.
    """

    pooled: PooledVideo
    text_ids: list[int]
    generate: Callable[[PromptLookup | None], Generator[int, None, None]]
    finished: Callable[[Answer], None] = lambda answer: None


@dataclass(frozen=True)
class Patience:
    """How long a question waits.

    Attributes:
        deadline: By time.monotonic(); None: as long as it takes.
        cancelled: Polled while waiting.
    """

    deadline: float | None
    cancelled: Callable[[], bool]


class Askable(Protocol):
    """The part of a video that an AnswerStream uses."""

    def prepare(
        self, question: str, options: GenerationOptions, timings: dict[str, float], patience: Patience
    ) -> PreparedQuestion | None:
        """Question tower, choice of frames and pooling; records their seconds in timings. None: cancelled."""

    def take_encoding_times(self) -> dict[str, float]:
        """Seconds of decoding and encoding, for the first question; zeros afterwards."""

    def empty_answer(self, question: str, finish: str) -> Answer:
        """The answer of a question that was cancelled while it waited."""
