"""The decoder on ONNX Runtime: sequences over in-place or growing caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.onnxruntime_stage import Stage
from ppllava_edge.engines.bundle.manifest import DecoderInfo
from ppllava_edge.runtime.decoding.capacity import cache_capacity, check_context
from ppllava_edge.runtime.decoding.decoder import Decoder
from ppllava_edge.runtime.decoding.growing_cache import GrowingSequence
from ppllava_edge.runtime.decoding.kv_cache import InPlaceSequence, KVCache, gives_one_row


class OnnxRuntimeDecoder(Decoder):
    """decoder.onnx, whole or in pieces that follow one another.

    Finished sequences leave their cache for the next.

    Args:
        stages: The opened graphs, in order.
        info: Sizes of the decoder.
        embed: Token ids (k) → embeddings (k, D) float32.
        cache: "in place" or "concatenated", as in engine.json.
    """

    verify_hint = ": ppllava-build BUNDLE --target cpu"

    def __init__(
        self,
        stages: list[Stage],
        info: DecoderInfo,
        embed: Callable[[list[int]], np.ndarray],
        cache: str = "in place",
    ):
        super().__init__(info)
        self.stages, self.embed, self.cache = stages, embed, cache
        self._idle: list[KVCache] = []

    @property
    def verifies(self) -> bool:
        """As Decoder says."""
        return not gives_one_row(self.stages)

    def start(self, length: int, new_tokens: int) -> InPlaceSequence | GrowingSequence:
        """As Decoder says."""
        check_context(length, self.info.context)
        capacity = cache_capacity(length + new_tokens, self.info.context)
        if self.cache == "concatenated":
            growing = GrowingSequence(self.stages, self.info, capacity, self.embed)
            self._track(growing)
            return growing
        with self._lock:
            fitting = [cache for cache in self._idle if cache.capacity == capacity]
            self._idle.clear()  # free a cache of another size before a new one is allocated
        if fitting:
            cache = fitting[0]
        else:
            cache = KVCache(self.info, capacity, self.stages[0].device)
            self._track(cache)
        cache.length = 0
        return InPlaceSequence(self.stages, self.info, cache, self.embed)

    def finish(self, sequence: Any) -> None:
        """As Decoder says."""
        if isinstance(sequence, InPlaceSequence):
            with self._lock:
                self._idle = [] if self._closed or sequence.failed else [sequence.cache]

    def _release_free(self) -> None:
        with self._lock:
            self._idle = []
