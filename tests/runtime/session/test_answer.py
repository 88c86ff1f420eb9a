"""The moments of an answer."""

from __future__ import annotations

import numpy as np
import pytest

from ppllava_edge.runtime.session.answer import Answer, attended_moments


def test_moments_are_the_frames_with_more_than_their_share() -> None:
    weights = np.array([0.1, 0.5, 0.05, 0.35]).reshape(4, 1, 1)
    assert attended_moments(weights, [0, 1, 2, 3]) == [(1.0, 0.5), (3.0, pytest.approx(0.35))]
    for nothing in (np.zeros((2, 1, 1)), np.full((2, 1, 1), np.nan)):
        assert attended_moments(nothing, [0, 1]) == []
    assert len(attended_moments(np.eye(20).sum(0).cumsum().reshape(20, 1, 1), list(range(20)))) == 5


def test_an_answer_without_a_token_has_no_time_to_the_first() -> None:
    """A timeout during prefill: no negative seconds."""
    timings = {"video_decode": 0.1, "vision": 0.03, "first_token": 0.0, "generate": 0.2}
    answer = Answer("What?", "", "nano", "timeout", [], [], 36, 9, 0, timings)
    assert answer.time_to_first_token == {"first_ask": None, "next_ask": None}
    timings["first_token"] = 0.25
    assert answer.time_to_first_token == {"first_ask": 0.25, "next_ask": pytest.approx(0.12)}
