"""The decoder at work: an in-place KV cache, bound once, and the loop that generates token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ..engines.bundle import DecoderInfo
from ..engines.errors import EngineError, PromptError
from ..engines.ort import Stage, import_onnxruntime

CAPACITY_STEP = 256  # attention's cost follows the cache's capacity, so it fits the generation, rounded up to this


class KVCache:
    """Keys and values of all layers, written in place: past and present of a layer are one buffer.

    Invariants (tests/test_kv_cache.py): 0 <= length <= capacity; a step writes at positions length … length+s-1 and nowhere else; no
    buffer is allocated after the cache was made.
    """

    def __init__(self, info: DecoderInfo, capacity: int, device: str = "cpu"):
        ort = import_onnxruntime()
        self.capacity, self.length, self.device = capacity, 0, device
        shape, dtype = (1, info.kv_heads, capacity, info.head_size), np.dtype(info.kv_dtype)
        self.buffers = {}
        for layer in range(info.layers):
            for kind in ("key", "value"):
                self.buffers[f"{layer}.{kind}"] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)

    @property
    def bytes(self) -> int:
        """Size of all buffers."""
        return sum(int(np.prod(b.shape())) * (2 if "16" in b.element_type() else 4) for b in self.buffers.values())


class Decoder:
    """decoder.onnx with its cache. One generation at a time."""

    def __init__(self, stage: Stage, info: DecoderInfo):
        self.stage, self.info = stage, info
        self.cache: KVCache | None = None
        self._step: _Step | None = None

    def start(self, length: int, new_tokens: int) -> KVCache:
        """Make room for a prompt of that length and new_tokens more; an old cache of the right size is used again.

        Raises PromptError if the prompt alone is too long for the model's context, and says by how much.
        """
        context = self.info.context
        if length >= context:
            raise PromptError(
                f"the prompt has {length} tokens, {length - context + 1} too many: the model's context is {context}; "
                "ask a shorter question or use fewer frames"
            )
        capacity = min(-(-min(length + new_tokens, context) // CAPACITY_STEP) * CAPACITY_STEP, context)
        if self.cache is None or self.cache.capacity != capacity:
            self.cache = self._step = None  # let go of the old memory first
            self.cache = KVCache(self.info, capacity, self.stage.device)
        self.cache.length = 0
        return self.cache

    def run(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Feed (s, D) embeddings after what the cache holds → logits (V,) float32 of the last position."""
        if self.cache is None:
            raise EngineError("the decoder was not started")
        cache, count = self.cache, len(inputs_embeds)
        if count < 1 or cache.length + count > cache.capacity:
            raise EngineError(f"the cache holds {cache.length} of {cache.capacity} positions; {count} more don't fit")
        if self._step is None or self._step.count != count:
            self._step = _Step(self.stage, self.info, cache, count)
        logits = self._step.run(inputs_embeds)
        cache.length += count
        return logits

    def prefill(self, inputs_embeds: np.ndarray, new_tokens: int = 1) -> np.ndarray:
        """Start over with a prompt (S, D) → logits (V,) of its last position."""
        self.start(len(inputs_embeds), new_tokens)
        return self.run(inputs_embeds)

    def generate(
        self,
        inputs_embeds: np.ndarray,
        max_new_tokens: int,
        embed: Callable[[int], np.ndarray],
        choose: Callable[[np.ndarray, list[int]], int],
        stop_ids: Iterable[int] = (),
    ) -> Iterator[int]:
        """Yield token ids until a stop id (yielded too), max_new_tokens, or the end of the context.

        embed: token id → (1, D) embedding. choose: (logits (V,), ids so far) → the next id.
        """
        if max_new_tokens < 1:
            return
        stops, ids = set(stop_ids), []
        logits = self.prefill(inputs_embeds, max_new_tokens)
        while True:
            token = choose(logits, ids)
            ids.append(token)
            yield token
            if token in stops or len(ids) >= max_new_tokens:
                return
            if self.cache is None or self.cache.length >= self.cache.capacity:
                return
            logits = self.run(embed(token))


class _Step:
    """A run of `count` positions with everything bound once: only the contents of small buffers change from step to step."""

    def __init__(self, stage: Stage, info: DecoderInfo, cache: KVCache, count: int):
        ort = import_onnxruntime()
        self.stage, self.cache, self.count = stage, cache, count
        kind = stage.dtypes["inputs_embeds"]
        self.hidden_value = np.float32("-inf") if kind == np.float32 else np.float16(-1e4)
        self.embeds = np.zeros((1, count, info.hidden_size), kind)
        self.positions = np.zeros((1, count), np.int64)
        self.write_index = np.zeros(1, np.int64)
        self.mask = np.full((1, 1, count, cache.capacity), self.hidden_value, kind)
        self.logits = np.zeros((1, info.vocab), np.float32)
        self.shown = 0  # mask columns below this are open for every row (single steps only)
        self.binding = stage.session.io_binding()
        self.inputs = {"inputs_embeds": self.embeds, "position_ids": self.positions, "write_index": self.write_index, "mask": self.mask}
        if stage.device == "cpu":
            for name, array in self.inputs.items():
                self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
            self.binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self.logits))
        for name, buffer in cache.buffers.items():
            self.binding.bind_ortvalue_input(f"past.{name}", buffer)
            self.binding.bind_ortvalue_output(f"present.{name}", buffer)

    def run(self, inputs_embeds: np.ndarray) -> np.ndarray:
        at = self.cache.length
        self.embeds[0] = inputs_embeds
        self.positions[0] = np.arange(at, at + self.count)
        self.write_index[0] = at
        if self.count == 1:
            if at < self.shown:  # a new generation in the same buffers
                self.mask[..., at + 1 :] = self.hidden_value
            self.mask[..., : at + 1] = 0
            self.shown = at + 1
        else:
            visible = np.arange(self.cache.capacity) <= self.positions[0][:, None]
            self.mask[0, 0] = np.where(visible, np.array(0, self.mask.dtype), self.hidden_value)
        if self.stage.device != "cpu":
            for name, array in self.inputs.items():
                self.binding.bind_cpu_input(name, array)
            self.binding.bind_output("logits", "cpu")
        try:
            self.stage.session.run_with_iobinding(self.binding)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise EngineError(f"decoder.onnx failed: {str(error).splitlines()[0][:300]}") from None
        if self.stage.device == "cpu":
            return self.logits[0].copy()
        return dict(zip(self.stage.outputs, self.binding.get_outputs()))["logits"].numpy()[0]
