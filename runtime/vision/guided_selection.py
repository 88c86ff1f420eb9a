"""Guided selection: many frames are encoded once, the question picks the moments, and only those are pooled.

What a long video's question is about often fills seconds of hours; a handful of frames taken at equal distances misses it. Here hundreds are looked
at, each as finely as ever, and the similarity that guides the pooling tells which of them the question is about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass

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
