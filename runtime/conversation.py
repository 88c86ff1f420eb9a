"""A chat about one video that keeps the first question's visual tokens and the decoder's cache: only what is new is read.

The model sees the turns before. What it costs: the video stays pooled for the first question (docs/runtime.md has measured it).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.errors import PromptError
from .answer import Asking, Pooled
from .scheduling import Turns

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .text import TextSide

ROOM = 512  # positions for turns to come, when a cache is made


class Conversation:
    """One video's visual tokens (N,D), the token ids around them, and a cache that holds as much of it as was read. history: whether the model sees
    the turns before."""

    def __init__(self, pipeline: Pipeline, text: TextSide, history: bool = True):
        self.pipeline, self.text, self.history = pipeline, text, history
        self.pooled: Pooled | None = None
        self.before: list[int] = []
        self.after: list[int] = []  # everything that follows the visual tokens: questions and answers
        self.sequence: Any = None
        self.turn = Turns()  # one question at a time

    def begin(self, pooled: Pooled, before: Sequence[int]) -> None:
        """The video as it was pooled for the first question, and the token ids before it."""
        self.pooled, self.before = pooled, list(before)

    @property
    def prefix(self) -> int:
        """Positions up to the last visual token."""
        return len(self.before) + (len(self.pooled.visual) if self.pooled is not None else 0)

    def next_ids(self, question: str) -> list[int]:
        """What a further question adds to the prompt: the end of the last answer, the roles, the question. Without history: what follows the visual
        tokens; earlier questions and answers are taken out of the cache."""
        if self.history:
            return self.text.follow_up_ids(question)
        self.after = []
        if self.sequence is not None and self.sequence.length > self.prefix and hasattr(self.sequence, "forget"):
            self.sequence.forget(self.sequence.length - self.prefix)
        return self.text.prompt_pieces(question)[1]

    def generate(self, new_ids: Sequence[int], asking: Asking, stop_ids: Sequence[int]) -> Generator[int, None, None]:
        """Read what is new (the first question's ids, or next_ids), yield the answer's token ids, remember them."""
        stops, heard, earlier = set(stop_ids), list[int](), list(self.after)
        self.after += new_ids
        try:
            prompt = self._unread(asking.max_new_tokens)
            ids = self.pipeline.generate(prompt, asking.max_new_tokens, stop_ids, asking.sampling, None, self.sequence)
            with contextlib.closing(ids):
                for token in ids:
                    heard.append(token)
                    yield token
        finally:
            if not heard:  # nothing was read, or not all of it: as if it hadn't been asked
                self.after = earlier
                self._drop()
            else:
                self.after += [token for token in heard if token not in stops]  # the template writes the end itself

    def _unread(self, new_tokens: int) -> Any:
        """The part of the prompt that the cache doesn't hold. Makes a cache if there is none with room."""
        assert self.pooled is not None
        pipeline, empty = self.pipeline, np.zeros((0, self.pipeline.manifest.decoder.hidden_size), np.float32)
        start, total = self.prefix, self.prefix + len(self.after)
        context, sequence = pipeline.manifest.decoder.context, self.sequence
        if total >= context:
            raise PromptError(f"the conversation has {total} tokens, the model's context is {context}: open the video again to start a new one")
        if sequence is not None and start <= sequence.length < total and (total + new_tokens <= sequence.capacity or sequence.capacity == context):
            return pipeline.prompt([], empty, self.after[sequence.length - start :])
        self._drop()
        self.sequence = pipeline.decoder.start(total, new_tokens + ROOM)
        return pipeline.prompt(self.before, self.pooled.visual, self.after)

    def _drop(self) -> None:
        if self.sequence is not None:
            self.pipeline.decoder.finish(self.sequence)
            self.sequence = None
