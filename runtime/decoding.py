"""The decoder at work: an in-place KV cache, bound once, and the loop that generates token ids."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np

from ..engines.bundle import DecoderInfo
from ..engines.errors import EngineError, PromptError
from ..engines.ort import Stage, first_line, import_onnxruntime

CAPACITY_STEP = 256  # attention's cost follows the cache's capacity, so it fits the generation, rounded up to this


class KVCache:
    """Keys and values of all layers, written in place: past and present of a layer are one buffer.

    Invariants (tests/test_decoding.py): 0 <= length <= capacity; a step writes at positions length … length+s-1 and nowhere else; no
    buffer is allocated after the cache was made.
    """

    def __init__(self, info: DecoderInfo, capacity: int, device: str = "cpu"):
        ort = import_onnxruntime()
        self.capacity, self.length, self.device = capacity, 0, device
        shape, dtype = (1, info.kv_heads, capacity, info.head_size), np.dtype(info.kv_dtype)
        self.bytes = 2 * info.layers * int(np.prod(shape)) * dtype.itemsize
        self.buffers = {}
        for layer in range(info.layers):
            for kind in ("key", "value"):
                self.buffers[f"{layer}.{kind}"] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)


class Sequence:
    """One prompt and what follows it: a cache, and the steps that fill it."""

    def __init__(self, pieces: list[Stage], info: DecoderInfo, cache: KVCache):
        self.pieces, self.info, self.cache = pieces, info, cache
        self._step: _Step | None = None

    def run(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Feed (s, D) embeddings after what the cache holds → logits (V,) float32 of the last position."""
        cache, count = self.cache, len(inputs_embeds)
        if count < 1 or cache.length + count > cache.capacity:
            raise EngineError(f"the cache holds {cache.length} of {cache.capacity} positions; {count} more don't fit")
        if self._step is None or self._step.count != count:
            self._step = _Step(self.pieces, self.info, cache, count)
        logits = self._step.run(inputs_embeds)
        cache.length += count
        return logits


class Decoder:
    """decoder.onnx, whole or in pieces that follow one another. Several sequences may be under way at once, each with a cache of its own;
    finished ones leave theirs for the next."""

    def __init__(self, pieces: list[Stage], info: DecoderInfo):
        self.pieces, self.info = pieces, info
        self._idle: list[KVCache] = []
        self._lock = threading.Lock()

    def start(self, length: int, new_tokens: int) -> Sequence:
        """A sequence with room for a prompt of that length and new_tokens more.

        Raises PromptError if the prompt alone is too long for the model's context, and says by how much.
        """
        context = self.info.context
        if length >= context:
            raise PromptError(
                f"the prompt has {length} tokens, {length - context + 1} too many: the model's context is {context}; "
                "ask a shorter question or use fewer frames"
            )
        capacity = min(-(-min(length + new_tokens, context) // CAPACITY_STEP) * CAPACITY_STEP, context)
        with self._lock:
            fitting = [cache for cache in self._idle if cache.capacity == capacity]
            self._idle.clear()  # one of another size is let go before a new one is made
        cache = fitting[0] if fitting else KVCache(self.info, capacity, self.pieces[0].device)
        cache.length = 0
        return Sequence(self.pieces, self.info, cache)

    def finish(self, sequence: Sequence) -> None:
        """The sequence is done with; its cache may serve the next one."""
        with self._lock:
            self._idle = [sequence.cache]

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """A prompt (S, D) → logits (V,) of its last position."""
        sequence = self.start(len(inputs_embeds), 1)
        try:
            return sequence.run(inputs_embeds)
        finally:
            self.finish(sequence)

    def generate(
        self,
        inputs_embeds: np.ndarray,
        max_new_tokens: int,
        embed: Callable[[int], np.ndarray],
        choose: Callable[[np.ndarray, list[int]], int],
        stop_ids: Iterable[int] = (),
    ) -> Generator[int, None, None]:
        """Yield token ids until a stop id (yielded too), max_new_tokens, or the end of the context.

        embed: token id → (1, D) embedding. choose: (logits (V,), ids so far) → the next id.
        """
        if max_new_tokens < 1:
            return
        stops, ids = set(stop_ids), list[int]()
        sequence = self.start(len(inputs_embeds), max_new_tokens)
        try:
            logits = sequence.run(inputs_embeds)
            while True:
                token = choose(logits, ids)
                ids.append(token)
                yield token
                if token in stops or len(ids) >= max_new_tokens or sequence.cache.length >= sequence.cache.capacity:
                    return
                logits = sequence.run(embed(token))
        finally:
            self.finish(sequence)


class _Step:
    """A run of `count` positions with everything bound once: only the contents of small buffers change from step to step."""

    def __init__(self, pieces: list[Stage], info: DecoderInfo, cache: KVCache, count: int):
        ort = import_onnxruntime()
        self.pieces, self.cache, self.count, self.device = pieces, cache, count, pieces[0].device
        kind: Any = pieces[0].dtypes["inputs_embeds"]
        self.hidden_value = np.float32("-inf") if kind == np.float32 else np.float16(-1e4)
        self.embeds: np.ndarray = np.zeros((1, count, info.hidden_size), kind)
        self.positions = np.zeros((1, count), np.int64)
        self.write_index = np.zeros(1, np.int64)
        self.mask: np.ndarray = np.full((1, 1, count, cache.capacity), self.hidden_value, kind)
        self.logits = np.zeros((1, info.vocab), np.float32)
        self.inputs = {"inputs_embeds": self.embeds, "position_ids": self.positions, "write_index": self.write_index, "mask": self.mask}
        self.bindings, self.buffers = [], [self.logits]  # buffers that are bound must outlive the binding
        bound = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.inputs.items()} if self.device == "cpu" else {}
        bound["logits"] = ort.OrtValue.ortvalue_from_numpy(self.logits)
        for piece in pieces:
            binding = piece.session.io_binding()
            for name in piece.dtypes:
                if name.startswith("past."):
                    binding.bind_ortvalue_input(name, cache.buffers[name.removeprefix("past.")])
                elif name in bound:
                    binding.bind_ortvalue_input(name, bound[name])
            for name in piece.outputs:
                if name.startswith("present."):
                    binding.bind_ortvalue_output(name, cache.buffers[name.removeprefix("present.")])
                elif self.device == "cpu":
                    if name not in bound:  # what one piece hands to the next
                        self.buffers.append(np.zeros((1, count, info.hidden_size), np.float32))
                        bound[name] = ort.OrtValue.ortvalue_from_numpy(self.buffers[-1])
                    binding.bind_ortvalue_output(name, bound[name])
            self.bindings.append(binding)

    def run(self, inputs_embeds: np.ndarray) -> np.ndarray:
        at = self.cache.length
        self.embeds[0] = inputs_embeds
        self.positions[0] = np.arange(at, at + self.count)
        self.write_index[0] = at
        if self.count == 1:
            self.mask[..., : at + 1] = 0  # a sequence only grows, so nothing has to be hidden again
        else:
            visible = np.arange(self.cache.capacity) <= self.positions[0][:, None]
            self.mask[0, 0] = np.where(visible, np.array(0, self.mask.dtype), self.hidden_value)
        if self.device != "cpu":
            for name, array in self.inputs.items():
                self.bindings[0].bind_cpu_input(name, array)
            self.bindings[0].bind_output("logits", "cpu")
        try:
            for piece, binding in zip(self.pieces, self.bindings):
                piece.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise EngineError(f"the decoder failed: {first_line(error)}") from None
        if self.device == "cpu":
            return self.logits[0].copy()
        return dict(zip(self.pieces[0].outputs, self.bindings[0].get_outputs()))["logits"].numpy()[0]
