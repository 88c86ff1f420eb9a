"""The moments of an answer."""

from __future__ import annotations

import numpy as np
import pytest

from ppllava_edge.runtime.session.answer import attended_moments


def test_moments_are_the_frames_with_more_than_their_share() -> None:
    weights = np.array([0.1, 0.5, 0.05, 0.35]).reshape(4, 1, 1)
    assert attended_moments(weights, [0, 1, 2, 3]) == [(1.0, 0.5), (3.0, pytest.approx(0.35))]
    for nothing in (np.zeros((2, 1, 1)), np.full((2, 1, 1), np.nan)):
        assert attended_moments(nothing, [0, 1]) == []
    assert len(attended_moments(np.eye(20).sum(0).cumsum().reshape(20, 1, 1), list(range(20)))) == 5
