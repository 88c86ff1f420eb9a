"""The KV cache of ONNX Runtime engines: written in place, every pass bound once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.onnxruntime_stage import Stage, first_line
from ppllava_edge.engines.bundle.engine_manifest import LAST_POSITIONS
from ppllava_edge.engines.bundle.manifest import DecoderInfo
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.libraries import import_onnxruntime
from ppllava_edge.runtime.decoding.capacity import cache_full_error, check_forget, masked_value
from ppllava_edge.runtime.decoding.sequence import Sequence

SMALL_PASS = 16  # positions; the buffers of such passes are kept


def gives_one_row(stages: list[Stage]) -> bool:
    """Whether the decoder gives the logits of the last position only."""
    outputs = next(stage for stage in stages if "logits" in stage.outputs).session.get_outputs()
    return bool(next(o.shape[0] for o in outputs if o.name == "logits") == 1)


class KVCache:
    """Keys and values of all layers, written in place: past and present of a layer are one buffer.

    Invariants (tests/runtime/decoding): 0 <= length <= capacity; a pass writes at positions length …
    length+count-1 and nowhere else; no buffer is allocated after construction.

    Attributes:
        buffers: "<layer>.key" and "<layer>.value" → (1, kv_heads, capacity, head_size) in kv_dtype.
        bytes: Total size of all buffers.

    Raises:
        EngineError: If there is too little memory.
    """

    def __init__(self, info: DecoderInfo, capacity: int, device: str = "cpu"):
        ort = import_onnxruntime()
        self.capacity, self.length, self.device = capacity, 0, device
        shape, dtype = (1, info.kv_heads, capacity, info.head_size), np.dtype(info.kv_dtype)
        self.bytes = 2 * info.layers * int(np.prod(shape)) * dtype.itemsize
        self.buffers = {}
        try:
            for layer in range(info.layers):
                for kind in ("key", "value"):
                    zeros = np.zeros(shape, dtype)
                    self.buffers[f"{layer}.{kind}"] = ort.OrtValue.ortvalue_from_numpy(zeros, device, 0)
        except MemoryError:
            raise EngineError(
                f"there is too little memory for a KV cache of {capacity} positions "
                f"({self.bytes / 1e6:.0f} MB); ask for fewer tokens or frames, or lower `parallel`"
            ) from None


class InPlaceSequence(Sequence):
    """A sequence over a KVCache.

    Args:
        stages: decoder.onnx, whole or in pieces that follow one another.
        info: Sizes of the decoder.
        cache: The cache; positions already in it precede the prompt.
        embed: Token ids (k) → embeddings (k, D).
    """

    def __init__(
        self,
        stages: list[Stage],
        info: DecoderInfo,
        cache: KVCache,
        embed: Callable[[list[int]], np.ndarray],
    ):
        self.stages, self.info, self.cache, self.embed = stages, info, cache, embed
        self._passes: dict[int, _BoundPass] = {}
        self._logits = np.zeros((0, info.vocab), np.float32)

    @property
    def length(self) -> int:  # type: ignore[override]
        """Positions that the cache holds."""
        return self.cache.length

    @property
    def capacity(self) -> int:  # type: ignore[override]
        """Maximum number of positions."""
        return self.cache.capacity

    def feed(self, prompt: np.ndarray) -> None:
        """Prefill with embeddings (S, D), after the positions that the cache holds."""
        count = len(prompt)
        if count < 1 or self.length + count > self.capacity:
            raise cache_full_error(self.length, self.capacity, count)
        if count not in self._passes:
            if count > SMALL_PASS:
                self._passes.clear()  # buffers of a long pass are large and not needed twice
            self._passes[count] = _BoundPass(self.stages, self.info, self.cache, count)
        self._logits = self._passes[count].run(prompt)
        self.cache.length += count

    def verify(self, tokens: list[int]) -> None:
        """As Sequence says."""
        self.feed(self.embed(tokens))

    def logits(self) -> np.ndarray:
        """As Sequence says."""
        return self._logits

    def forget(self, count: int) -> None:
        """As Sequence says."""
        check_forget(self.length, count)
        self.cache.length -= count
        for bound in self._passes.values():
            bound.hide_from(self.cache.length)


class _BoundPass:
    """A pass over `count` positions, bound once: only the contents of small buffers change between passes."""

    def __init__(self, stages: list[Stage], info: DecoderInfo, cache: KVCache, count: int):
        self.stages, self.cache, self.count, self.device = stages, cache, count, stages[0].device
        kind: Any = stages[0].dtypes["inputs_embeds"]
        self.hidden_value = kind(masked_value(kind))
        self.embeds: np.ndarray = np.zeros((1, count, info.hidden_size), kind)
        self.positions = np.zeros((1, count), np.int64)
        self.write_index = np.zeros(1, np.int64)
        self.mask: np.ndarray = np.full((1, 1, count, cache.capacity), self.hidden_value, kind)
        rows = 1 if gives_one_row(stages) else min(count, LAST_POSITIONS)
        self.logits = np.zeros((rows, info.vocab), np.float32)
        self.inputs = {
            "inputs_embeds": self.embeds,
            "position_ids": self.positions,
            "write_index": self.write_index,
            "mask": self.mask,
        }
        self.buffers = [self.logits]  # buffers that are bound must outlive the binding
        self.bindings = self._bind(info)

    def _bind(self, info: DecoderInfo) -> list[Any]:
        """One binding per stage; on the CPU, what one stage passes to the next is bound too."""
        ort = import_onnxruntime()
        on_cpu, bindings = self.device == "cpu", []
        bound = {"logits": ort.OrtValue.ortvalue_from_numpy(self.logits)}
        if on_cpu:
            bound |= {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.inputs.items()}
        for stage in self.stages:
            binding = stage.session.io_binding()
            for name in stage.dtypes:
                if name.startswith("past."):
                    binding.bind_ortvalue_input(name, self.cache.buffers[name.removeprefix("past.")])
                elif name in bound:
                    binding.bind_ortvalue_input(name, bound[name])
            for name in stage.outputs:
                if name.startswith("present."):
                    binding.bind_ortvalue_output(name, self.cache.buffers[name.removeprefix("present.")])
                elif on_cpu:
                    if name not in bound:
                        self.buffers.append(np.zeros((1, self.count, info.hidden_size), np.float32))
                        bound[name] = ort.OrtValue.ortvalue_from_numpy(self.buffers[-1])
                    binding.bind_ortvalue_output(name, bound[name])
            bindings.append(binding)
        return bindings

    def run(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Embeddings (count, D) → logits (n, V)."""
        self._place(inputs_embeds)
        try:
            for stage, binding in zip(self.stages, self.bindings):
                stage.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise EngineError(f"the decoder failed: {first_line(error)}") from None
        if self.device == "cpu":
            return self.logits.copy()
        outputs = dict(zip(self.stages[0].outputs, self.bindings[0].get_outputs()))
        logits: np.ndarray = outputs["logits"].numpy()
        return logits

    def _place(self, inputs_embeds: np.ndarray) -> None:
        """Write this pass's embeddings, positions and mask into the bound buffers."""
        at = self.cache.length
        self.embeds[0] = inputs_embeds
        self.positions[0] = np.arange(at, at + self.count)
        self.write_index[0] = at
        if self.count == 1:
            self.mask[..., : at + 1] = 0  # a sequence only grows, so no position has to be masked again
        else:
            visible = np.arange(self.cache.capacity) <= self.positions[0][:, None]
            self.mask[0, 0] = np.where(visible, np.array(0, self.mask.dtype), self.hidden_value)
        if self.device != "cpu":
            for name, array in self.inputs.items():
                self.bindings[0].bind_cpu_input(name, array)
            self.bindings[0].bind_output("logits", "cpu")

    def hide_from(self, length: int) -> None:
        """Mask positions that were taken back: otherwise a pass only unmasks positions."""
        if self.count == 1:
            self.mask[..., length:] = self.hidden_value
