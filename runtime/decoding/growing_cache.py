"""The KV cache of lowered graphs (older ONNX Runtimes): every pass returns a new, longer cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ppllava_edge.engines.backends.onnxruntime_stage import Stage
from ppllava_edge.engines.bundle.manifest import DecoderInfo
from ppllava_edge.runtime.decoding.capacity import cache_full_error, causal_mask, check_forget
from ppllava_edge.runtime.decoding.sequence import Sequence


class GrowingSequence(Sequence):
    """A sequence whose cache is a new, longer array after every pass.

    Args:
        stages: decoder.onnx, whole or in pieces that follow one another.
        info: Sizes of the decoder.
        capacity: Maximum number of positions.
        embed: Token ids (k) → embeddings (k, D).
    """

    def __init__(
        self,
        stages: list[Stage],
        info: DecoderInfo,
        capacity: int,
        embed: Callable[[list[int]], np.ndarray],
    ):
        self.stages, self.info, self.capacity, self.embed = stages, info, capacity, embed
        self.length = 0
        empty = np.zeros((1, info.kv_heads, 0, info.head_size), info.kv_dtype)
        names = [f"{layer}.{kind}" for layer in range(info.layers) for kind in ("key", "value")]
        self.past = dict.fromkeys(names, empty)
        self._logits = np.zeros((0, info.vocab), np.float32)

    @property
    def bytes(self) -> int:
        """Bytes of keys and values, which grow with every pass."""
        return sum(array.nbytes for array in self.past.values())

    def feed(self, prompt: np.ndarray) -> None:
        """Prefill with embeddings (S, D), after the positions that the cache holds."""
        count, total = len(prompt), self.length + len(prompt)
        if count < 1 or total > self.capacity:
            raise cache_full_error(self.length, self.capacity, count)
        values: dict[str, np.ndarray] = {
            "inputs_embeds": prompt[None],
            "position_ids": np.arange(self.length, total)[None],
            "mask": causal_mask(self.length, count, self.stages[0].dtypes["inputs_embeds"]),
        }
        values |= {f"past.{name}": array for name, array in self.past.items()}
        for stage in self.stages:
            given = {name: values[name] for name in stage.dtypes}
            values |= dict(zip(stage.outputs, stage(False, **given)))
        self.past = {name: values[f"present.{name}"] for name in self.past}
        self.length, self._logits = total, values["logits"]

    def verify(self, tokens: list[int]) -> None:
        """As Sequence says."""
        self.feed(self.embed(tokens))

    def logits(self) -> np.ndarray:
        """Logits (1, V) float32 of the last position."""
        return self._logits

    def forget(self, count: int) -> None:
        """As Sequence says."""
        check_forget(self.length, count)
        self.length -= count
        self.past = {name: array[:, :, : self.length] for name, array in self.past.items()}
