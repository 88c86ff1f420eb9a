"""The decoder on a GPU: buffers allocated once, the next step fed on the device, one step captured as a CUDA graph.

Greedy answers cross to the host as token ids (8 bytes a token); sampling takes the last position's logits along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..engines.bundle import DecoderInfo
from ..engines.device import Buffer, CudaDevice
from ..engines.engine import LAST_POSITIONS, Engine
from ..engines.errors import EngineError, PromptError
from .decoding import check_context, fitting_capacity, no_room
from .lookup import LEFT_OUT, MOST_DISAGREEMENT, Lookup, accept, disagreement
from .sampling import Sampling

PREFILL, DECODE = 0, 1  # the engine's profiles
TOP = ("top_values", "top_ids")  # for runtimes that sample from a few candidates; this one takes all logits


@dataclass(frozen=True)
class GpuPrompt:
    """Token ids, visual tokens (N,D) on the GPU or the host, token ids."""

    before: list[int]
    visual: Any
    after: list[int]

    def __len__(self) -> int:
        return len(self.before) + len(self.visual) + len(self.after)


class GpuSequence:
    """One prompt and what follows it. Invariants as KVCache's: a step writes where it should and nowhere else; nothing is allocated after the
    first step of a length."""

    def __init__(self, stages: list[Any], info: DecoderInfo, capacity: int, gpu: CudaDevice, decode_profile: int = DECODE):
        self.decode_profile = decode_profile
        self.stages, self.info, self.capacity, self.gpu, self.length = stages, info, capacity, gpu, 0
        shape = (1, info.kv_heads, capacity, info.head_size)
        dtype = next(stage.dtypes[name] for stage in stages for name in stage.dtypes if name.startswith("past."))
        self.cache = {f"{i}.{kind}": gpu.zeros(shape, dtype) for i in range(info.layers) for kind in ("key", "value")}
        self.float = stages[0].dtypes["inputs_embeds"]
        self.token, self.position, self.write_index = (gpu.empty(shape, np.int64) for shape in ((1, 1), (1, 1), (1,)))
        self.next_token, self.next_position, self.next_write_index = (gpu.empty(shape, np.int64) for shape in ((1, 1), (1, 1), (1,)))
        self.best = gpu.empty((LAST_POSITIONS, 1), np.int64)
        self.logits = gpu.empty((LAST_POSITIONS, info.vocab), np.float32)
        self.is_text = gpu.upload(np.ones((1, LAST_POSITIONS, 1), np.bool_))
        self.no_rows = gpu.zeros((1, LAST_POSITIONS, info.hidden_size), self.float)
        self._carried: dict[tuple[str, int], Buffer] = {}
        self._step: Callable[[], None] | None = None
        self._steps = 0

    def feed(self, prompt: GpuPrompt | np.ndarray) -> None:
        """Prefill: all of a prompt, or given rows (S,D)."""
        if not isinstance(prompt, GpuPrompt):
            prompt = GpuPrompt([], self.gpu.upload(np.asarray(prompt), dtype=self.float), [])
        count, first, visual = len(prompt), len(prompt.before), len(prompt.visual)
        ids = np.zeros((1, count), np.int64)
        ids[0, :first], ids[0, first + visual :] = prompt.before, prompt.after
        is_text = np.ones((1, count, 1), np.bool_)
        is_text[0, first : first + visual] = False
        rows = self.gpu.empty((1, count, self.info.hidden_size), self.float)
        self._place(prompt.visual, rows.reshape(count, self.info.hidden_size).rows(first, visual))
        self._run(count, self.gpu.upload(ids), self.gpu.upload(is_text), rows, *self._places(count), PREFILL)

    def _place(self, visual: Any, into: Buffer) -> None:
        if isinstance(visual, Buffer) and visual.dtype == into.dtype:
            self.gpu.copy(visual, into)
        else:
            self.gpu.upload(np.asarray(visual), into)

    def _places(self, count: int) -> tuple[Buffer, Buffer]:
        positions = np.arange(self.length, self.length + count, dtype=np.int64)[None]
        return self.gpu.upload(positions), self.gpu.upload(np.array([self.length], np.int64))

    def verify(self, tokens: list[int]) -> None:
        """Several tokens in one pass; `best` holds what follows each of them."""
        count = len(tokens)
        rows, is_text = self.no_rows.reshape(LAST_POSITIONS, self.info.hidden_size), self.is_text.reshape(LAST_POSITIONS)
        shape = (1, count, self.info.hidden_size)
        self._run(count, self.gpu.upload(np.array([tokens], np.int64)), is_text.rows(0, count).reshape(1, count, 1),
                  rows.rows(0, count).reshape(*shape), *self._places(count), PREFILL)  # fmt: skip

    def step(self, token: int | None = None) -> None:
        """One token more: the one that was likeliest (it is on the GPU already), or this one."""
        if self.length + 1 > self.capacity:
            raise no_room(self.length, self.capacity, 1)
        if token is not None:
            self.gpu.upload(np.array([[token]], np.int64), self.next_token)
        if self._step is not None:
            self._step()
        elif self._steps and all(stage.captures for stage in self.stages):
            self._step = self.gpu.capture(self._decode)  # the first step ran as it is: libraries set themselves up then
            self._step()
        else:
            self._decode()
        self._steps += 1
        self.length += 1

    def _decode(self) -> None:
        """Queue one step over the same buffers: what the last one said comes first."""
        for source, into in ((self.next_token, self.token), (self.next_position, self.position), (self.next_write_index, self.write_index)):
            self.gpu.copy(source, into)
        rows = self.no_rows.reshape(LAST_POSITIONS, self.info.hidden_size).rows(0, 1).reshape(1, 1, self.info.hidden_size)
        is_text = self.is_text.reshape(LAST_POSITIONS).rows(0, 1).reshape(1, 1, 1)
        self._queue(1, self.token, is_text, rows, self.position, self.write_index, self.decode_profile)

    def _run(self, count: int, ids: Buffer, is_text: Buffer, rows: Buffer, positions: Buffer, write_index: Buffer, profile: int) -> None:
        if count < 1 or self.length + count > self.capacity:
            raise no_room(self.length, self.capacity, count)
        self._queue(count, ids, is_text, rows, positions, write_index, profile)
        self.length += count

    def _queue(self, count: int, ids: Buffer, is_text: Buffer, rows: Buffer, positions: Buffer, write_index: Buffer, profile: int) -> None:
        given = min(count, LAST_POSITIONS)
        values: dict[str, Any] = {"token_ids": ids, "is_text": is_text, "inputs_embeds": rows, "position_ids": positions, "write_index": write_index}
        values |= {f"past.{name}": buffer for name, buffer in self.cache.items()}
        results = {"next_token": self.next_token, "next_position": self.next_position, "next_write_index": self.next_write_index,
                   "best": self.best.rows(0, given), "logits": self.logits.rows(0, given)}  # fmt: skip
        results |= {f"present.{name}": buffer for name, buffer in self.cache.items()}
        for stage in self.stages:
            wanted = [name for name in stage.outputs if name not in TOP]
            outputs = {name: results[name] if name in results else self._carry(name, count, stage) for name in wanted}
            stage.run({name: values[name] for name in stage.dtypes}, outputs, profile)
            values |= outputs

    def _carry(self, name: str, count: int, stage: Any) -> Buffer:
        """What one piece hands to the next: hidden rows, or the mask."""
        key = (name, count)
        if key not in self._carried:
            shape = (1, 1, count, self.capacity) if name == "mask" else (1, count, self.info.hidden_size)
            self._carried[key] = self.gpu.empty(shape, stage.outputs[name])
        return self._carried[key]

    def forget(self, count: int) -> None:
        """Take the last count positions back: they will be written again."""
        assert 0 <= count <= self.length
        self.length -= count
        self.gpu.upload(np.array([[self.length]], np.int64), self.next_position)
        self.gpu.upload(np.array([self.length], np.int64), self.next_write_index)

    def token_id(self) -> int:
        """The likeliest next token: the only thing that a greedy step copies to the host."""
        return int(self.gpu.download(self.next_token)[0, 0])

    def last_logits(self, count: int) -> np.ndarray:
        """(V,) float32 of the last position of a pass over count positions."""
        row: np.ndarray = self.gpu.download(self.logits.rows(min(count, LAST_POSITIONS) - 1, 1))[0]
        return row

    def restart(self) -> None:
        """For the next prompt."""
        self.length, self._carried = 0, {key: buffer for key, buffer in self._carried.items() if key[1] == 1}


class GpuDecoder:
    """Sequences over one engine's stages; finished ones leave their buffers and their captured step to the next."""

    def __init__(self, stages: list[Any], info: DecoderInfo, engine: Engine, gpu: CudaDevice, embed: Any = None):
        self.stages, self.info, self.gpu = stages, info, gpu
        self.fixed: int | None = engine.details.get("capacity")
        self.decode_profile = DECODE if engine.details.get("decoder_profiles", 2) == 2 else PREFILL
        self._rebuild = f"ppllava-build {engine.folder.parent.parent} --target {engine.target} --capacity"
        self._idle: list[GpuSequence] = []
        self._lock = threading.RLock()  # an abandoned answer may be collected, and give its cache back, anywhere
        self._disagreement: float | None = None

    def disagreement(self) -> float:
        """How far a pass over 8 positions lies from 8 single steps, in standard deviations of the logits. Measured once."""
        if self._disagreement is None:
            tokens = [i % self.info.vocab for i in range(3, 3 + 2 * LAST_POSITIONS)]
            sequence = self.start(len(tokens), 1)
            sequence.feed(GpuPrompt(tokens[:LAST_POSITIONS], np.zeros((0, self.info.hidden_size), np.float32), []))
            singly = []
            for token in tokens[LAST_POSITIONS:]:
                sequence.step(token)
                singly.append(sequence.last_logits(1))
            sequence.forget(LAST_POSITIONS)
            sequence.verify(tokens[LAST_POSITIONS:])
            self._disagreement = disagreement(singly, self.gpu.download(sequence.logits))
            self.finish(sequence)
        return self._disagreement

    def start(self, length: int, new_tokens: int) -> GpuSequence:
        """A sequence with room for a prompt. Raises PromptError if the prompt is too long for the model, or for the engine."""
        check_context(length, self.info.context)
        if self.fixed and length >= self.fixed:
            raise self.too_long(length)
        capacity = self.fixed or fitting_capacity(length + new_tokens, self.info.context)
        with self._lock:
            for sequence in self._idle:
                if sequence.capacity == capacity:
                    self._idle.remove(sequence)
                    sequence.restart()
                    return sequence
            self._idle.clear()
        return GpuSequence(self.stages, self.info, capacity, self.gpu, self.decode_profile)

    def too_long(self, length: int) -> PromptError:
        """What to say of a prompt that the engine's cache can't hold."""
        holds = self.fixed or self.info.context
        return PromptError(f"the prompt has {length} tokens; this engine's cache holds {holds}: use fewer frames, or {self._rebuild} {length + 256}")

    def finish(self, sequence: GpuSequence) -> None:
        """The sequence is done with; its buffers may serve the next one."""
        with self._lock:
            self._idle = [sequence]

    def prefill(self, prompt: Any) -> np.ndarray:
        """A prompt → logits (V,) of its last position."""
        sequence = self.start(len(prompt), 1)
        try:
            sequence.feed(prompt)
            return sequence.last_logits(len(prompt))
        finally:
            self.finish(sequence)

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int,
        stop_ids: Iterable[int] = (),
        sampling: Sampling | None = None,
        lookup: Lookup | None = None,
        sequence: Any = None,
    ) -> Generator[int, None, None]:
        """Yield token ids until a stop id (yielded too), max_new_tokens, or the end of the context or of the engine's cache.

        sequence: to go on with, the caller's; None: one for this answer alone.
        """
        if max_new_tokens < 1:
            return
        sampling = sampling or Sampling()
        greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1
        if lookup is not None and not greedy:
            raise PromptError("looking ahead on a GPU works with greedy answers only (temperature 0, no repetition penalty)")
        if lookup is not None and self.disagreement() > MOST_DISAGREEMENT:
            lookup.note, lookup = LEFT_OUT, None
        choose, stops, ids, draft = sampling.chooser(), set(stop_ids), list[int](), list[int]()
        own = sequence is None
        sequence = sequence or self.start(len(prompt), max_new_tokens)
        try:
            sequence.feed(prompt)
            following, count = None, len(prompt)
            while True:
                chosen = following if following is not None else [sequence.token_id() if greedy else choose(sequence.last_logits(count), ids)]
                certain = sequence.length - len(draft)

                def ends(token: int, right: int, certain: int = certain) -> bool:
                    return token in stops or len(ids) >= max_new_tokens or certain + right >= sequence.capacity

                accepted, ended = yield from accept(chosen, draft, ids, ends)
                if ended:
                    return
                if lookup is not None:
                    lookup.count(len(draft), accepted)
                if accepted < len(draft):
                    sequence.forget(len(draft) - accepted)
                most = min(sequence.capacity - sequence.length, max_new_tokens - len(ids)) - 1
                wrong = bool(draft) and accepted < len(draft)
                draft = lookup.draft(ids, most) if lookup is not None else []
                if draft:
                    sequence.verify([ids[-1], *draft])
                    following = self.gpu.download(sequence.best)[: len(draft) + 1, 0].tolist()
                else:
                    sequence.step(None if greedy and not wrong else ids[-1])
                    following, count = None, 1
        finally:
            if own:
                self.finish(sequence)


class GrowingGpuDecoder(GpuDecoder):
    """The same over lowered graphs (TensorRT 10.3): past and what is new give present, in two sets of buffers that take turns."""

    def __init__(self, stages: list[Any], info: DecoderInfo, engine: Engine, gpu: CudaDevice, embed: Callable[[Sequence[int]], np.ndarray]):
        super().__init__(stages, info, engine, gpu)
        self.embed = embed

    def prefill(self, prompt: Any) -> np.ndarray:
        """A prompt → logits (V,) of its last position."""
        return _Growing(self, len(prompt)).run(self._rows(prompt))

    def _rows(self, prompt: Any) -> np.ndarray:
        if not isinstance(prompt, GpuPrompt):
            return np.asarray(prompt)
        return np.concatenate([self.embed(prompt.before), np.asarray(prompt.visual, np.float32), self.embed(prompt.after)])

    def start(self, length: int, new_tokens: int) -> Any:
        """A sequence with room for as much as the engine's cache holds."""
        check_context(length, self.info.context)
        return _Growing(self, length)

    def finish(self, sequence: Any) -> None:
        """The sequence is done with; its buffers go."""

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int,
        stop_ids: Iterable[int] = (),
        sampling: Sampling | None = None,
        lookup: Lookup | None = None,
        sequence: Any = None,
    ) -> Generator[int, None, None]:
        """Yield token ids; without drafts: a lowered graph gives the last position's logits only."""
        if lookup is not None:
            raise EngineError("looking ahead needs an engine that verifies several tokens at once; lowered graphs don't")
        if max_new_tokens < 1:
            return
        choose, stops, ids = (sampling or Sampling()).chooser(), set(stop_ids), list[int]()
        growing = sequence or _Growing(self, len(prompt))
        logits = growing.run(self._rows(prompt))
        while True:
            ids.append(choose(logits, ids))
            yield ids[-1]
            if ids[-1] in stops or len(ids) >= max_new_tokens or growing.length >= growing.capacity:
                return
            logits = growing.run(self.embed(ids[-1:]))


class _Growing:
    """One sequence of a growing cache."""

    def __init__(self, decoder: GrowingGpuDecoder, length: int):
        self.decoder, self.length = decoder, 0
        self.capacity = min(decoder.fixed or decoder.info.context, decoder.info.context)
        if length >= self.capacity:
            raise decoder.too_long(length)
        info, gpu = decoder.info, decoder.gpu
        dtype = next(stage.dtypes[name] for stage in decoder.stages for name in stage.dtypes if name.startswith("past."))
        each = (1, info.kv_heads, self.capacity, info.head_size)
        names = [f"{i}.{kind}" for i in range(info.layers) for kind in ("key", "value")]
        self.sets = [{name: gpu.empty(each, dtype) for name in names} for _ in range(2)]
        self.logits = gpu.empty((1, info.vocab), np.float32)

    def run(self, rows: np.ndarray) -> np.ndarray:
        """Feed (s, D) embeddings → logits (V,)."""
        info, gpu, stages, count = self.decoder.info, self.decoder.gpu, self.decoder.stages, len(rows)
        total = self.length + count
        if total > self.capacity:
            raise no_room(self.length, self.capacity, count)
        kind = stages[0].dtypes["inputs_embeds"]
        positions = np.arange(self.length, total, dtype=np.int64)
        mask = np.where(np.arange(total) <= positions[:, None], 0.0, -1e4 if kind == np.float16 else -np.inf)[None, None]
        values: dict[str, Any] = {"inputs_embeds": gpu.upload(rows[None], dtype=kind), "position_ids": gpu.upload(positions[None])}
        values["mask"] = gpu.upload(mask, dtype=kind)
        past, present = self.sets
        heads = (1, info.kv_heads)
        values |= {f"past.{name}": _filled(buffer, (*heads, self.length, info.head_size)) for name, buffer in past.items()}
        results = {f"present.{name}": _filled(buffer, (*heads, total, info.head_size)) for name, buffer in present.items()} | {"logits": self.logits}
        for stage in stages:
            outputs = {name: results.get(name) or gpu.empty((1, count, info.hidden_size), dtype) for name, dtype in stage.outputs.items()}
            stage.run({name: values[name] for name in stage.dtypes}, outputs, PREFILL if self.length == 0 else self.decoder.decode_profile)
            values |= outputs
        self.sets.reverse()
        self.length = total
        row: np.ndarray = gpu.download(self.logits)[0]
        return row


def _filled(buffer: Buffer, shape: tuple[int, ...]) -> Buffer:
    """The front of a buffer as an array of this shape."""
    return replace(buffer, shape=shape)
