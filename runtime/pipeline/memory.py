"""How much memory a model holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Memory:
    """What a VideoQA holds, in bytes.

    Attributes:
        weights: Weights of the stages that are open, by the size of their files. An engine may pack a copy.
        caches: KV caches: of answers under way, of chats, and the free one that is kept for the next answer.
        features: Features, candidates, live windows and small pictures of the videos and views that the app
            still refers to.
        mapped: Candidates that are mapped from a temporary file or the feature cache. They take disk space;
            the system keeps in memory what was read last.
    """

    weights: int
    caches: int
    features: int
    mapped: int

    def as_dict(self) -> dict[str, int]:
        """The attributes, for JSON."""
        return asdict(self)


def is_mapped(array: Any) -> bool:
    """Whether an array, or the one that it is a view of, is mapped from a file."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False
