"""A clip whose frames are encoded as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppllava_edge.runtime.pipeline.base import BasePipeline


class ClipEncoder:
    """Encodes frames in any order and grouping, each under a number, then joins them into one clip.

    Attributes:
        states: Frame number → states (1, S, P+1, C).
    """

    def __init__(self, pipeline: BasePipeline):
        self.pipeline = pipeline
        self.states: dict[int, Any] = {}

    def add(self, pixels: np.ndarray, numbers: Sequence[int], more: bool = False) -> None:
        """Encode frames: pixels (k, 3, size, size) under k numbers. more: whether others follow soon."""
        states = self.pipeline.encode_trunk(pixels, more=more)
        self.states |= zip(numbers, self.pipeline.rows(states))

    def features(self, order: Sequence[int]) -> Any:
        """Features (T, P, C) of these frames, which may repeat. Call it once: it frees the states."""
        last = {number: at for at, number in enumerate(order)}
        states = (
            self.states.pop(number) if last[number] == at else self.states[number]
            for at, number in enumerate(order)
        )
        return self.pipeline.branch(self.pipeline.join(states, len(order)))
