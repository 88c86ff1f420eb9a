"""Choose the next token: greedily, or with temperature, top-k, top-p and a repetition penalty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ppllava_edge.engines.errors import EngineError, PromptError
from ppllava_edge.runtime.language.numbers import finite_number, integer

MIN_PENALTY, MAX_PENALTY = 0.01, 100.0  # beyond them float32 logits may overflow


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The default is greedy.

    Attributes:
        temperature: 0 takes the most likely token; higher values spread the choice.
        top_p: Choose among the smallest set of tokens that holds this share of the probability; 1: all.
        top_k: Choose among this many of the most likely tokens; 0: all.
        repetition_penalty: Above 1, tokens that occurred become less likely; 1: no change; 0.01 to 100.
        seed: Seed of the random numbers, 0 or more; None: a new one for every answer.

    Raises:
        PromptError: If a value is out of range, or no number.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            self._set(name, finite_number(name, getattr(self, name)))
        self._set("top_k", integer("top_k", self.top_k, 0))
        if self.temperature < 0:
            raise PromptError(f"temperature must be 0 or more, not {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise PromptError(f"top_p must be above 0 and at most 1, not {self.top_p:g}")
        if not MIN_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            raise PromptError(
                f"repetition_penalty must be from {MIN_PENALTY:g} to {MAX_PENALTY:g}, "
                f"not {self.repetition_penalty:g}"
            )
        if self.seed is not None:
            self._set("seed", integer("seed", self.seed, 0))

    def _set(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)  # frozen for everybody else

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen, regardless of earlier ones."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def sampler(self) -> Sampler:
        """Return a new sampler, for one answer."""
        return Sampler(self)


class Sampler:
    """Chooses the tokens of one answer, with random numbers of its own.

    Attributes:
        sampling: The settings.
        greedy: As Sampling.greedy.
    """

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self.greedy = sampling.greedy
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray, ids: list[int]) -> int:
        """Choose the next token from logits (V,) and the ids of the answer so far."""
        s = self.sampling
        if s.repetition_penalty != 1 and ids:
            logits = penalise(logits, ids, s.repetition_penalty)
        if s.temperature == 0:
            best = int(logits.argmax())  # the first NaN, if there is one
            if np.isnan(logits[best]):
                raise _no_numbers()
            return best
        p = probabilities(logits, s.temperature, s.top_k, s.top_p)
        return int(self._random.choice(len(p), p=p))


def _no_numbers() -> EngineError:
    return EngineError("the decoder computed logits that are no numbers; try engine='standard'")


def penalise(logits: np.ndarray, ids: list[int], penalty: float) -> np.ndarray:
    """Lower the logits (V,) of tokens that occurred (Keskar et al., 2019).

    Args:
        logits: (V,), left unchanged.
        ids: Tokens that occurred.
        penalty: Divides positive logits and multiplies negative ones.
    """
    logits = logits.copy()
    seen = np.unique(ids)
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def probabilities(logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Compute the probabilities that sampling draws from.

    Args:
        logits: (V,).
        temperature: Above 0.
        top_k: Keep this many of the most likely tokens; 0: all.
        top_p: Of those, keep the smallest set that holds this share of the probability.

    Returns:
        (V,) float64, which sum to 1.

    Raises:
        EngineError: If the logits aren't numbers.
    """
    logits = logits.astype(np.float64)
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # at a very low temperature all but the largest become -inf
        scaled = (logits - logits.max()) / temperature
    if 0 < top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -top_k)[-top_k]] = -np.inf
    p: np.ndarray = np.exp(scaled)
    p /= p.sum()
    if np.isnan(p[0]):
        raise _no_numbers()
    if top_p < 1:
        order = np.argsort(-scaled, kind="stable")
        likelier = np.cumsum(p[order]) - p[order]  # probability of all tokens before each
        p[order[likelier >= top_p]] = 0
        p /= p.sum()
    return p
