"""Choosing moments by their similarity to the question."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ppllava_edge.runtime.vision.guided_selection import choose_moments, frame_scores


@given(st.integers(1, 60), st.integers(1, 16), st.integers(1, 3), st.integers(0, 100))
def test_chosen_moments_hold_the_best_one_and_are_as_many_as_asked_for(
    n: int, count: int, window: int, seed: int
) -> None:
    scores = np.random.default_rng(seed).random(n)
    chosen = choose_moments(scores, count, min(window, n))
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, n) and int(scores.argmax()) in chosen
    assert all(0 <= i < n for i in chosen)


def test_a_frame_is_worth_its_most_similar_patches() -> None:
    cosine = np.zeros((3, 9, 9), np.float32)
    cosine[1, 4, 4:6], cosine[2] = 0.9, 0.1
    assert frame_scores(cosine).argmax() == 1
