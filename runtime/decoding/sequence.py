"""The interface of all KV caches: a prompt and its continuation, fed pass by pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import EngineError
from ppllava_edge.runtime.language.sampling import Sampler


class Sequence(ABC):
    """A KV cache and the decoder passes that fill it.

    A pass processes one or more positions after those that the cache holds. Greedy answers and drafts need no
    more than these four: feed, verify, chosen, forget (runtime/decoding/generate.py).

    Attributes:
        length: Positions that the cache holds. Invariant: 0 <= length <= capacity.
        capacity: Maximum number of positions.
        can_forget: Whether `forget` works.
        failed: Whether a pass failed. What the cache holds is then unknown, and no other answer uses it.
    """

    length: int
    capacity: int
    can_forget = True
    failed = False

    @abstractmethod
    def feed(self, prompt: Any) -> None:
        """Prefill: read a prompt, as Pipeline.prompt returns it, in one pass.

        Raises:
            EngineError: If it doesn't fit the cache, or the engine fails.
        """

    @abstractmethod
    def verify(self, tokens: list[int]) -> None:
        """Run one pass over token ids: the last one chosen, then a draft (if any)."""

    @abstractmethod
    def logits(self) -> np.ndarray:
        """Logits (n, V) float32 of the last pass: of its last position, or of its last min(count, 8)."""

    def chosen(self, sampler: Sampler, ids: list[int], count: int) -> Iterable[int]:
        """The tokens that follow the last `count` positions of the last pass.

        Args:
            sampler: Chooses from logits (V,) and the ids so far.
            ids: The answer so far; it may grow while the result is consumed.
            count: 1 after a prompt or a decode step; after a draft, the tokens of that pass.
        """
        return (sampler(row, ids) for row in self.logits()[-count:])

    def forget(self, count: int) -> None:
        """Take the last `count` positions back: they will be written again.

        Raises:
            EngineError: If the cache holds fewer, or can't take any back (can_forget).
        """
        raise EngineError("this engine's cache can't take positions back")
