"""Guided selection: many frames are encoded once, the question picks the moments, and only those are pooled.

What a long video's question is about often fills seconds of hours; a handful of frames taken at equal distances misses it. Here hundreds are looked
at, each as finely as ever, and the similarity that guides the pooling tells which of them the question is about.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .pipeline import Pipeline

IN_MEMORY = 512 << 20  # bytes of states or features; more are mapped from a temporary file
BEST_PATCHES = 0.02  # of a frame: their mean similarity is the frame's


def frame_scores(cosine: np.ndarray) -> np.ndarray:
    """cosine (T,rows,columns) → (T,): how much of what the question names a frame shows, the mean over its most similar patches."""
    flat = np.sort(cosine.reshape(len(cosine), -1), axis=1)
    scores: np.ndarray = flat[:, -max(1, round(BEST_PATCHES * flat.shape[1])) :].mean(1)
    return scores


def choose_moments(scores: np.ndarray, count: int, window: int = 1) -> list[int]:
    """The frames to pool, ascending: the best scores, each with the neighbours that share its pooling window (`window` frames along time), so that
    what is pooled together also belongs together.
    """
    if count >= len(scores):
        return list(range(len(scores)))
    chosen = set[int]()
    for best in np.argsort(-scores, kind="stable").tolist():
        if best in chosen:
            continue
        first = min(max(best - (window - 1) // 2, 0), len(scores) - window)
        run = [i for i in range(first, first + window) if i not in chosen]
        run.sort(key=lambda i, best=best: (i != best, abs(i - best)))  # type: ignore[misc]
        chosen.update(run[: count - len(chosen)])
        if len(chosen) == count:
            break
    return sorted(chosen)


def array_for(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array in memory or, if it is large, mapped from a file that has no name and goes away with it."""
    if int(np.prod(shape, dtype=np.int64)) * dtype.itemsize <= IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="ppllava-") as file:
        return np.memmap(file, dtype, "w+", shape=shape)


class Candidates:
    """Frames that were encoded to choose from. states (n,S,P+1,C): of the trunk; features (n,P,C): of the temporal branch, run over neighbours."""

    def __init__(self, pipeline: Pipeline, states: np.ndarray, features: np.ndarray | None = None):
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
        return np.concatenate([frame_scores(self.pipeline.similarity(np.ascontiguousarray(self.features[chunk]), q)) for chunk in self._chunks()])

    def choose(self, q: Any, count: int, window: int) -> tuple[Any, list[int]]:
        """Features (count,P,C) of the frames that q is about, the branch run over them anew, and which of the candidates they are."""
        chosen = choose_moments(self.scores(q), count, window)
        return self.pipeline.branch(np.ascontiguousarray(self.states[chosen])), chosen
