"""Choosing the next token: greedy, or temperature, top-k, top-p and repetition penalty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ppllava_edge.engines.errors import PromptError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0 and top_p 1 keep every token. repetition_penalty 1 changes nothing. seed None: a new one each time."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (self.temperature >= 0 and np.isfinite(self.temperature), "temperature must be 0 or more"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (self.top_k >= 0, "top_k must be 0 or more"),
            (
                self.repetition_penalty > 0 and np.isfinite(self.repetition_penalty),
                "repetition_penalty must be above 0",
            ),
        )
        for fine, message in checks:
            if not fine:
                raise PromptError(message)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is chosen, whatever came before."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def sampler(self) -> Sampler:
        """Chooses the tokens of one answer."""
        return Sampler(self)


class Sampler:
    """Chooses tokens for one answer; owns its random numbers."""

    def __init__(self, sampling: Sampling):
        self.sampling, self.greedy = sampling, sampling.greedy
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray, ids: list[int]) -> int:
        """Choose the next token from logits (V,) and the ids so far."""
        s = self.sampling
        if s.repetition_penalty != 1 and ids:
            logits = penalise(logits, ids, s.repetition_penalty)
        if s.temperature == 0:
            return int(logits.argmax())
        p = probabilities(logits, s.temperature, s.top_k, s.top_p)
        return int(self._random.choice(len(p), p=p))


def penalise(logits: np.ndarray, ids: list[int], penalty: float) -> np.ndarray:
    """Divide positive and multiply negative logits of tokens that occurred (Keskar et al., 2019)."""
    logits, seen = logits.copy(), np.unique(ids)
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def probabilities(logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """(V,) float64, summing to 1: softmax at a temperature over the k likeliest tokens and the smallest set that holds top_p of the mass."""
    scaled = logits.astype(np.float64) / temperature
    if 0 < top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -top_k)[-top_k]] = -np.inf
    p: np.ndarray = np.exp(scaled - scaled.max())
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-scaled, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
    return p
