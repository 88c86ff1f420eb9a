"""How many positions a KV cache holds, and which of them a pass may attend to."""

from __future__ import annotations

import numpy as np

from ppllava_edge.engines.bundle.engine_manifest import CAPACITY_STEP
from ppllava_edge.engines.errors import EngineError, PromptError


def check_context(length: int, context: int) -> None:
    """Check that a prompt leaves the model room to answer.

    Args:
        length: Tokens of the prompt, text and visual.
        context: Tokens that the model can attend to.

    Raises:
        PromptError: If the prompt fills the context; says by how much it is too long.
    """
    if length >= context:
        raise PromptError(
            f"the prompt has {length} tokens, {length - context + 1} too many: the model's context is "
            f"{context}; ask a shorter question or use fewer frames"
        )


def cache_capacity(positions: int, context: int) -> int:
    """The capacity of a cache for this many positions: whole steps of 256, no more than the context."""
    return min(-(-positions // CAPACITY_STEP) * CAPACITY_STEP, context)


def cache_full_error(length: int, capacity: int, count: int) -> EngineError:
    """The error for a full KV cache: `length` of `capacity` positions are used and `count` more don't fit."""
    return EngineError(f"the cache holds {length} of {capacity} positions; {count} more don't fit")


def check_forget(length: int, count: int) -> None:
    """Raise EngineError if `count` positions can't be taken back from a cache that holds `length`."""
    if not 0 <= count <= length:
        raise EngineError(f"the cache holds {length} positions; {count} can't be taken back")


def masked_value(dtype: np.dtype | type) -> float:
    """The value that masks a position in attention: -inf, or -1e4 in float16 (-1e9 overflows there)."""
    return -1e4 if dtype == np.float16 else -np.inf


def causal_mask(length: int, count: int, dtype: np.dtype | type) -> np.ndarray:
    """The mask of a pass over `count` positions after `length` cached ones.

    Returns:
        (1, 1, count, length + count) float64: 0 where a position may attend, masked_value elsewhere.
    """
    positions = np.arange(length, length + count)
    visible = np.arange(length + count) <= positions[:, None]
    return np.where(visible, 0.0, masked_value(dtype))[None, None]
