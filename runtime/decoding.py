"""The decoder at work: an in-place KV cache, bound once, and the loop that generates token ids."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np

from ..engines.bundle import DecoderInfo
from ..engines.engine import CAPACITY_STEP, LAST_POSITIONS
from ..engines.errors import EngineError, PromptError
from ..engines.ort import Stage, first_line, import_onnxruntime
from .lookup import LEFT_OUT, MOST_DISAGREEMENT, Lookup, accept, disagreement

SMALL_STEP = 16  # positions; the buffers of such steps are kept


def check_context(length: int, context: int) -> None:
    """Raise PromptError for a prompt that leaves the model no room to answer; says by how much it is too long."""
    if length >= context:
        raise PromptError(
            f"the prompt has {length} tokens, {length - context + 1} too many: the model's context is {context}; ask a shorter question or use fewer frames"
        )


def fitting_capacity(positions: int, context: int) -> int:
    """Of a cache for so many positions: whole steps, no more than the model's context."""
    return min(-(-positions // CAPACITY_STEP) * CAPACITY_STEP, context)


def no_room(length: int, capacity: int, count: int) -> EngineError:
    """What to say when a cache is full."""
    return EngineError(f"the cache holds {length} of {capacity} positions; {count} more don't fit")


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
        self._steps: dict[int, _Step] = {}

    @property
    def length(self) -> int:
        """Positions that the cache holds."""
        return self.cache.length

    @property
    def capacity(self) -> int:
        """Positions that it could hold."""
        return self.cache.capacity

    def run(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Feed (s, D) embeddings after what the cache holds → logits (n, V) float32: of the last position, or, from an engine that gives more,
        of the last min(s, 8)."""
        cache, count = self.cache, len(inputs_embeds)
        if count < 1 or cache.length + count > cache.capacity:
            raise no_room(cache.length, cache.capacity, count)
        if count not in self._steps:
            if count > SMALL_STEP:
                self._steps.clear()  # buffers of a long step are large and not needed twice
            self._steps[count] = _Step(self.pieces, self.info, cache, count)
        logits = self._steps[count].run(inputs_embeds)
        cache.length += count
        return logits

    def forget(self, count: int) -> None:
        """Take the last count positions back: they will be written again."""
        if not 0 <= count <= self.cache.length:
            raise EngineError(f"the cache holds {self.cache.length} positions; {count} can't be taken back")
        self.cache.length -= count
        for step in self._steps.values():
            step.hide_from(self.cache.length)


class GrowingSequence:
    """The same over lowered graphs, whose cache grows: past and what is new give present (JetPack 6, older ONNX Runtimes)."""

    def __init__(self, pieces: list[Stage], info: DecoderInfo, context: int):
        self.pieces, self.info, self.capacity, self.length = pieces, info, context, 0
        shape = (1, info.kv_heads, 0, info.head_size)
        self.past = {f"{layer}.{kind}": np.zeros(shape, info.kv_dtype) for layer in range(info.layers) for kind in ("key", "value")}

    def run(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Feed (s, D) embeddings after what the cache holds → logits (1, V) float32 of the last position."""
        count, total = len(inputs_embeds), self.length + len(inputs_embeds)
        if count < 1 or total > self.capacity:
            raise no_room(self.length, self.capacity, count)
        positions = np.arange(self.length, total)
        hidden = -1e4 if self.pieces[0].dtypes["inputs_embeds"] == np.float16 else -np.inf
        mask = np.where(np.arange(total) <= positions[:, None], 0.0, hidden)[None, None]
        values: dict[str, np.ndarray] = {"inputs_embeds": inputs_embeds[None], "position_ids": positions[None], "mask": mask}
        values |= {f"past.{name}": array for name, array in self.past.items()}
        for piece in self.pieces:
            given = {name: values[name] for name in piece.dtypes}
            values |= dict(zip(piece.outputs, piece(False, **given)))
        self.past = {name: values[f"present.{name}"] for name in self.past}
        self.length = total
        return values["logits"]

    def forget(self, count: int) -> None:
        """Take the last count positions back."""
        if not 0 <= count <= self.length:
            raise EngineError(f"the cache holds {self.length} positions; {count} can't be taken back")
        self.length -= count
        self.past = {name: array[:, :, : self.length] for name, array in self.past.items()}


class Decoder:
    """decoder.onnx, whole or in pieces that follow one another. Several sequences may be under way at once, each with a cache of its own;
    finished ones leave theirs for the next. cache: "in place" or "concatenated", as in engine.json."""

    def __init__(self, pieces: list[Stage], info: DecoderInfo, cache: str = "in place"):
        self.pieces, self.info, self.cache = pieces, info, cache
        self._idle: list[KVCache] = []
        self._lock = threading.RLock()  # an abandoned answer may be collected, and give its cache back, anywhere
        self._disagreement: float | None = None

    @property
    def verifies(self) -> bool:
        """Whether a pass gives the logits of several positions, so that drafts can be verified."""
        outputs = next(piece for piece in self.pieces if "logits" in piece.outputs).session.get_outputs()
        return bool(next(o.shape[0] for o in outputs if o.name == "logits") != 1)

    def disagreement(self, embed: Callable[[list[int]], np.ndarray]) -> float:
        """How far a pass over 8 positions lies from 8 single steps, in standard deviations of the logits. Measured once."""
        if self._disagreement is None:
            tokens = [i % self.info.vocab for i in range(3, 3 + 2 * LAST_POSITIONS)]
            sequence = self.start(len(tokens), 1)
            sequence.run(embed(tokens[:LAST_POSITIONS]))
            singly = [sequence.run(embed([token]))[-1] for token in tokens[LAST_POSITIONS:]]
            sequence.forget(LAST_POSITIONS)
            self._disagreement = disagreement(singly, sequence.run(embed(tokens[LAST_POSITIONS:])))
        return self._disagreement

    def start(self, length: int, new_tokens: int) -> Sequence | GrowingSequence:
        """A sequence with room for a prompt of that length and new_tokens more.

        Raises PromptError if the prompt alone is too long for the model's context, and says by how much.
        """
        check_context(length, self.info.context)
        capacity = fitting_capacity(length + new_tokens, self.info.context)
        if self.cache == "concatenated":
            return GrowingSequence(self.pieces, self.info, capacity)
        with self._lock:
            fitting = [cache for cache in self._idle if cache.capacity == capacity]
            self._idle.clear()  # one of another size is let go before a new one is made
        cache = fitting[0] if fitting else KVCache(self.info, capacity, self.pieces[0].device)
        cache.length = 0
        return Sequence(self.pieces, self.info, cache)

    def finish(self, sequence: Sequence | GrowingSequence) -> None:
        """The sequence is done with; its cache may serve the next one."""
        if isinstance(sequence, Sequence):
            with self._lock:
                self._idle = [sequence.cache]

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """A prompt (S, D) → logits (V,) of its last position."""
        sequence = self.start(len(inputs_embeds), 1)
        try:
            logits: np.ndarray = sequence.run(inputs_embeds)[-1]
            return logits
        finally:
            self.finish(sequence)

    def generate(
        self,
        inputs_embeds: np.ndarray,
        max_new_tokens: int,
        embed: Callable[[list[int]], np.ndarray],
        choose: Callable[[np.ndarray, list[int]], int],
        stop_ids: Iterable[int] = (),
        lookup: Lookup | None = None,
        sequence: Sequence | GrowingSequence | None = None,
    ) -> Generator[int, None, None]:
        """Yield token ids until a stop id (yielded too), max_new_tokens, or the end of the context.

        embed: token ids (k) → (k, D) embeddings. choose: (logits (V,), ids so far) → the next id. lookup: drafts that are verified several in
        a pass; choose must give the same id every time then. sequence: to go on with, the caller's; None: one for this answer alone. The last id is
        yielded before it is in the cache.
        """
        if max_new_tokens < 1:
            return
        stops, ids = set(stop_ids), list[int]()
        if lookup is not None and not self.verifies:
            raise EngineError("looking ahead needs an engine that verifies several tokens at once: ppllava-build BUNDLE --target cpu")
        if lookup is not None and self.disagreement(embed) > MOST_DISAGREEMENT:
            lookup.note, lookup = LEFT_OUT, None
        own = sequence is None
        sequence = sequence or self.start(len(inputs_embeds), max_new_tokens)
        try:
            logits, draft = sequence.run(inputs_embeds)[-1:], list[int]()
            while True:
                certain = sequence.length - len(draft)  # positions filled by what was chosen

                def ends(token: int, right: int, certain: int = certain) -> bool:
                    return token in stops or len(ids) >= max_new_tokens or certain + right >= sequence.capacity

                accepted, ended = yield from accept((choose(row, ids) for row in logits), draft, ids, ends)
                if ended:
                    return
                if lookup is not None:
                    lookup.count(len(draft), accepted)
                if accepted < len(draft):
                    sequence.forget(len(draft) - accepted)
                most = min(sequence.capacity - sequence.length, max_new_tokens - len(ids)) - 1
                draft = lookup.draft(ids, most) if lookup is not None else []
                logits = sequence.run(embed([ids[-1], *draft]))
        finally:
            if own:
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
        outputs = next(piece for piece in pieces if "logits" in piece.outputs).session.get_outputs()
        rows = 1 if next(o.shape[0] for o in outputs if o.name == "logits") == 1 else min(count, LAST_POSITIONS)
        self.logits = np.zeros((rows, info.vocab), np.float32)
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
            return self.logits.copy()
        logits: np.ndarray = dict(zip(self.pieces[0].outputs, self.bindings[0].get_outputs()))["logits"].numpy()
        return logits

    def hide_from(self, length: int) -> None:
        """Positions were taken back: a mask that only uncovers must cover them again."""
        if self.count == 1:
            self.mask[..., length:] = self.hidden_value
