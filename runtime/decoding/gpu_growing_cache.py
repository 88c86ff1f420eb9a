"""The KV cache on a GPU over lowered graphs (TensorRT 10.3).

Such a graph writes past and new keys and values into another buffer, so two sets of buffers alternate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.backends.device_memory import Buffer
from ppllava_edge.engines.bundle.manifest import DecoderInfo
from ppllava_edge.runtime.decoding.capacity import cache_full_error, causal_mask
from ppllava_edge.runtime.decoding.gpu_cache import PREFILL, GpuPrompt, cache_buffers
from ppllava_edge.runtime.decoding.sequence import Sequence


class GrowingGpuSequence(Sequence):
    """A sequence whose keys and values move between two sets of buffers from pass to pass.

    Args:
        stages: The opened decoder engine, whole or in pieces that follow one another.
        info: Sizes of the decoder.
        capacity: Positions that each set holds.
        gpu: The GPU that holds the buffers.
        decode_profile: The engine's profile for passes after the first.
        embed: Token ids (k) → embeddings (k, D) float32, on the host.
    """

    can_forget = False  # the layout is head by head: taking positions back would mean copying the rest

    def __init__(
        self,
        stages: list[Any],
        info: DecoderInfo,
        capacity: int,
        gpu: CudaDevice,
        decode_profile: int,
        embed: Callable[[list[int]], np.ndarray],
    ):
        self.stages, self.info, self.capacity, self.gpu, self.length = stages, info, capacity, gpu, 0
        self.decode_profile, self.embed = decode_profile, embed
        self.sets = [cache_buffers(gpu.empty, stages, info, capacity) for _ in range(2)]
        self._logits = gpu.empty((1, info.vocab), np.float32)

    @property
    def bytes(self) -> int:
        """Bytes of both sets of keys and values."""
        return sum(buffer.nbytes for buffers in self.sets for buffer in buffers.values())

    def feed(self, prompt: GpuPrompt | np.ndarray) -> None:
        """Prefill; the prompt's tokens are embedded on the host."""
        self._read(self._embeddings(prompt))

    def _embeddings(self, prompt: GpuPrompt | np.ndarray) -> np.ndarray:
        if not isinstance(prompt, GpuPrompt):
            return np.asarray(prompt)
        visual = np.asarray(prompt.visual, np.float32)
        return np.concatenate([self.embed(prompt.before), visual, self.embed(prompt.after)])

    def verify(self, tokens: list[int]) -> None:
        """As Sequence says, for one token: a lowered graph gives the last position's logits only."""
        self._read(self.embed(tokens))

    def logits(self) -> np.ndarray:
        """Logits (1, V) float32 of the last position, copied to the host."""
        return self.gpu.download(self._logits)

    def _read(self, embeddings: np.ndarray) -> None:
        """A pass over embeddings (s, D)."""
        info, gpu, count = self.info, self.gpu, len(embeddings)
        total = self.length + count
        if count < 1 or total > self.capacity:
            raise cache_full_error(self.length, self.capacity, count)
        kind = self.stages[0].dtypes["inputs_embeds"]
        values: dict[str, Any] = {
            "inputs_embeds": gpu.upload(embeddings[None], dtype=kind),
            "position_ids": gpu.upload(np.arange(self.length, total, dtype=np.int64)[None]),
            "mask": gpu.upload(causal_mask(self.length, count, kind), dtype=kind),
        }
        past, present = self.sets
        values |= {f"past.{name}": self._front(buffer, self.length) for name, buffer in past.items()}
        results = {f"present.{name}": self._front(buffer, total) for name, buffer in present.items()}
        results["logits"] = self._logits
        profile = PREFILL if self.length == 0 else self.decode_profile
        for stage in self.stages:
            outputs = {
                name: results[name] if name in results else gpu.empty((1, count, info.hidden_size), dtype)
                for name, dtype in stage.outputs.items()
            }
            stage.run({name: values[name] for name in stage.dtypes}, outputs, profile)
            values |= outputs
        self.sets.reverse()
        self.length = total

    def _front(self, buffer: Buffer, positions: int) -> Buffer:
        """The front of a buffer, as an array of this many positions."""
        return replace(buffer, shape=(1, self.info.kv_heads, positions, self.info.head_size))
