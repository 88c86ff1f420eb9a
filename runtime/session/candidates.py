"""Frames that were encoded so that a question can choose among them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from ppllava_edge.runtime.pipeline.base import BasePipeline
from ppllava_edge.runtime.vision.guided_selection import choose_moments, frame_scores

IN_MEMORY = 512 << 20  # bytes of states or features; more are mapped from a temporary file


def array_for(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array in memory or, if it is large, mapped from a file that has no name and goes away with it."""
    if int(np.prod(shape, dtype=np.int64)) * dtype.itemsize <= IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="ppllava-") as file:
        return np.memmap(file, dtype, "w+", shape=shape)


class Candidates:
    """Frames that were encoded to choose from. states (n,S,P+1,C): of the trunk; features (n,P,C): of the temporal branch, run over neighbours."""

    def __init__(self, pipeline: BasePipeline, states: np.ndarray, features: np.ndarray | None = None):
        self.pipeline, self.states = pipeline, states
        self.features = features if features is not None else self._branch_in_chunks()

    def _chunks(self) -> Iterator[slice]:
        v = self.pipeline.manifest.vision
        step = v.max_frames or v.default_frames
        return (slice(i, i + step) for i in range(0, len(self.states), step))

    def _branch_in_chunks(self) -> np.ndarray:
        features: np.ndarray | None = None
        for chunk in self._chunks():
            part = np.asarray(self.pipeline.branch(self.states[chunk]))
            if features is None:
                features = array_for((len(self.states), *part.shape[1:]), part.dtype)
            features[chunk] = part
        assert features is not None
        return features

    def scores(self, q: Any) -> np.ndarray:
        """(n,) float32: how much each frame shows of what the question q (1,E) names."""
        return np.concatenate(
            [
                frame_scores(self.pipeline.similarity(np.ascontiguousarray(self.features[chunk]), q))
                for chunk in self._chunks()
            ]
        )

    def choose(self, q: Any, count: int, window: int) -> tuple[Any, list[int]]:
        """Features (count,P,C) of the frames that q is about, the branch run over them anew, and which of the candidates they are."""
        chosen = choose_moments(self.scores(q), count, window)
        return self.pipeline.branch(np.ascontiguousarray(self.states[chosen])), chosen
