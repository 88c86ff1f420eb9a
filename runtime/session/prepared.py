"""A question on its way to the decoder: the video pooled for it, and how its tokens are generated."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from ppllava_edge.runtime.language.prompt_lookup import PromptLookup
from ppllava_edge.runtime.session.admission import Holder, Patience
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
    """

    pooled: PooledVideo
    text_ids: list[int]
    generate: Callable[[PromptLookup | None], Generator[int, None, None]]


class Askable(Protocol):
    """The part of a video that an answer uses."""

    def turn(self, patience: Patience, holder: Holder) -> AbstractContextManager[Any]:
        """Wait until the video takes a question; held until it is answered. A chat takes one at a time.

        Raises:
            BusyError: If too many wait, at the deadline, or if the calling thread may not wait.
            EndedEarly: If it was cancelled.
        """

    def prepare(
        self, question: str, options: GenerationOptions, timings: dict[str, float], patience: Patience
    ) -> PreparedQuestion:
        """Question tower, choice of frames and pooling; records their seconds in timings.

        Raises:
            EndedEarly: At the deadline, or if it was cancelled.
        """

    def take_encoding_times(self) -> dict[str, float]:
        """Seconds of decoding and encoding, for the first question; zeros afterwards."""

    def empty_answer(self, question: str, finish: str) -> Answer:
        """An answer that ended before its first token."""
