"""Scores of a quantised model against the float one, and the limits of the scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import PPLLaVAError


class GateError(PPLLaVAError):
    """The quantised model drifts too far from the float one. Command lines exit with status 3."""

    exit_status = 3


@dataclass(frozen=True)
class Limit:
    """The bound of one score.

    Attributes:
        stage: The stage that the score is about, for messages.
        score: Name of the score, an attribute of Scores.
        bound: The smallest or largest value allowed.
        at_least: Whether the score must be at least the bound; otherwise at most.
    """

    stage: str
    score: str
    bound: float
    at_least: bool

    def holds(self, value: float) -> bool:
        """Whether a measured value is within the limit; NaN is not."""
        return bool(value >= self.bound if self.at_least else value <= self.bound)


LIMITS = (
    Limit("vision", "feature_cosine", 0.99, True),
    Limit("similarity", "rank_correlation", 0.97, True),
    Limit("projector", "token_cosine", 0.97, True),
    Limit("decoder", "divergence", 0.05, False),
    Limit("decoder", "agreement", 0.95, True),
)
INT4_BOUNDS = {"divergence": 0.15, "agreement": 0.9}  # looser ones for a decoder of 4 bits


def limits(int4: bool) -> list[Limit]:
    """The limits of the gate; int4: whether the decoder has INT4 weights."""
    bounds = INT4_BOUNDS if int4 else {}
    return [
        Limit(limit.stage, limit.score, bounds.get(limit.score, limit.bound), limit.at_least)
        for limit in LIMITS
    ]


@dataclass
class Scores:
    """Means over held-back clips and questions.

    Attributes:
        feature_cosine: Cosine of the vision features.
        feature_sqnr: Signal-to-noise ratio of the vision features, decibels.
        rank_correlation: Spearman's rank correlation of all patches' similarity to the question.
        token_cosine: Cosine of the visual tokens.
        token_sqnr: Signal-to-noise ratio of the visual tokens, decibels.
        divergence: KL(float || quantised) of the next token, nats, over an answer of up to 32 tokens.
        agreement: Share of those positions where both would choose the same token greedily.
        clips: How many clips were compared.
        questions: How many questions were asked.
        positions: How many next tokens were compared.
    """

    feature_cosine: float
    feature_sqnr: float
    rank_correlation: float
    token_cosine: float
    token_sqnr: float
    divergence: float
    agreement: float
    clips: int
    questions: int
    positions: int

    def violations(self, int4: bool) -> list[tuple[Limit, float]]:
        """Limits that don't hold, with the measured value."""
        measured = [(limit, float(getattr(self, limit.score))) for limit in limits(int4)]
        return [(limit, value) for limit, value in measured if not limit.holds(value)]

    def as_dict(self) -> dict[str, Any]:
        """For the manifest and the report; None instead of NaN and infinity, which JSON doesn't have."""
        scores = {name: round(value, 5) for name, value in vars(self).items()}
        return {name: value if math.isfinite(value) else None for name, value in scores.items()}


def describe(violations: Sequence[tuple[Limit, float]]) -> str:
    """Violations in words: "decoder: divergence 0.310, at most 0.05 is allowed"."""
    parts = []
    for limit, value in violations:
        score = limit.score.replace("_", " ")
        bound = f"at {'least' if limit.at_least else 'most'} {limit.bound:g} is allowed"
        parts.append(f"{limit.stage}: {score} {value:.3f}, {bound}")
    return "; ".join(parts)


def compare(want: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Mean cosine of the rows (…, C), and the signal-to-noise ratio in decibels."""
    a = want.reshape(-1, want.shape[-1]).astype(np.float64)
    b = got.reshape(-1, got.shape[-1]).astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = float(((a * b).sum(axis=1) / np.maximum(norms, 1e-30)).mean())
    noise = float(np.square(a - b).sum())
    sqnr = float(min(10 * np.log10(np.square(a).sum() / noise), 99.0)) if noise > 0 else 99.0
    return cosine, sqnr


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two maps; 1 for the same order."""
    ranks = [
        np.argsort(np.argsort(x.reshape(-1), kind="stable"), kind="stable").astype(np.float64) for x in (a, b)
    ]
    if len(ranks[0]) < 2:
        return 1.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def divergence(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """KL(softmax(want) || softmax(got)) of every row of logits (n, V): (n,) nats."""
    p = _log_softmax(want)
    q = _log_softmax(got)
    return np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
