"""Guided selection: encode many frames once, then let each question choose the few that are pooled.

A question about a long video is often about a few seconds of it, which a handful of evenly spaced frames
misses. With guided selection hundreds of frames are encoded at full detail. Their similarity to the
question, which also guides the pooling, shows which frames it is about.
"""

from __future__ import annotations

import numpy as np

BEST_PATCHES = 0.02  # share of a frame's patches whose mean similarity is the frame's score


def frame_scores(cosine: np.ndarray) -> np.ndarray:
    """Score how much each frame shows of what a question asks about.

    Args:
        cosine: (T, rows, columns), of every patch with the question.

    Returns:
        (T,): the mean over each frame's most similar patches.
    """
    ascending = np.sort(cosine.reshape(len(cosine), -1), axis=1)
    best = max(1, round(BEST_PATCHES * ascending.shape[1]))
    scores: np.ndarray = ascending[:, -best:].mean(1)
    return scores


def choose_moments(scores: np.ndarray, count: int, window: int = 1) -> list[int]:
    """Choose the frames to pool: those with the best scores, each with its neighbours.

    Frames that are pooled together should belong together, so a frame brings as many neighbours as share
    its pooling window, the nearest first.

    Args:
        scores: (T,), of `frame_scores`.
        count: How many frames to choose.
        window: Frames that a pooling window spans.

    Returns:
        Frame numbers, ascending: `count` of them, or all if there are fewer.
    """
    if count >= len(scores):
        return list(range(len(scores)))
    chosen = set[int]()
    for best in np.argsort(-scores, kind="stable").tolist():
        if best in chosen:
            continue
        new = [i for i in _neighbours(best, window, len(scores)) if i not in chosen]
        chosen.update(new[: count - len(chosen)])
        if len(chosen) == count:
            break
    return sorted(chosen)


def _neighbours(frame: int, window: int, count: int) -> list[int]:
    """The frames of a window around a frame, nearest first: the frame itself, then its neighbours."""
    first = min(max(frame - (window - 1) // 2, 0), count - window)
    return sorted(range(first, first + window), key=lambda i: abs(i - frame))
