"""The KV cache on a GPU: buffers are allocated once, each step feeds the next on the device.

A decode step is captured as a CUDA graph. Greedy answers cross to the host as token ids (8 bytes a token);
sampling copies the last position's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.backends.device_memory import Buffer
from ppllava_edge.engines.bundle.engine_manifest import LAST_POSITIONS
from ppllava_edge.engines.bundle.manifest import DecoderInfo
from ppllava_edge.runtime.decoding.capacity import cache_full_error, check_forget
from ppllava_edge.runtime.decoding.sequence import Sequence
from ppllava_edge.runtime.language.sampling import Sampler

PREFILL, DECODE = 0, 1  # the engine's profiles
TOP = ("top_values", "top_ids")  # candidates for runtimes that sample from a few; this one uses all logits


@dataclass(frozen=True)
class GpuPrompt:
    """A prompt to embed on the GPU: token ids, visual tokens (N, D) on the GPU or the host, token ids."""

    before: list[int]
    visual: Any
    after: list[int]

    def __len__(self) -> int:
        return len(self.before) + len(self.visual) + len(self.after)


def cache_buffers(
    allocate: Callable[[tuple[int, ...], Any], Buffer], stages: list[Any], info: DecoderInfo, capacity: int
) -> dict[str, Buffer]:
    """Allocate keys and values of all layers.

    Args:
        allocate: gpu.zeros where hidden positions are read (NaN would spread), else gpu.empty.
        stages: The decoder's stages, which say the dtype.
        info: Sizes of the decoder.
        capacity: Positions.

    Returns:
        "<layer>.key" and "<layer>.value" → (1, kv_heads, capacity, head_size).
    """
    dtypes = {name: dtype for stage in stages for name, dtype in stage.dtypes.items()}
    dtype = next(dtype for name, dtype in dtypes.items() if name.startswith("past."))
    names = [f"{layer}.{kind}" for layer in range(info.layers) for kind in ("key", "value")]
    return {name: allocate((1, info.kv_heads, capacity, info.head_size), dtype) for name in names}


class GpuSequence(Sequence):
    """A sequence whose cache is written in place on the GPU.

    Invariants as in KVCache: a pass writes its own positions and no others; nothing is allocated after the
    first pass of a length.

    Args:
        stages: The opened decoder engine, whole or in pieces that follow one another.
        info: Sizes of the decoder.
        capacity: Positions that the cache holds.
        gpu: The GPU that holds the buffers.
        decode_profile: The engine's profile for one position.
    """

    def __init__(
        self,
        stages: list[Any],
        info: DecoderInfo,
        capacity: int,
        gpu: CudaDevice,
        decode_profile: int = DECODE,
    ):
        self.stages, self.info, self.capacity, self.gpu, self.length = stages, info, capacity, gpu, 0
        self.decode_profile = decode_profile
        self.cache = cache_buffers(gpu.zeros, stages, info, capacity)
        self.float = stages[0].dtypes["inputs_embeds"]
        self.token, self.next_token = (gpu.empty((1, 1), np.int64) for _ in range(2))
        self.position, self.next_position = (gpu.empty((1, 1), np.int64) for _ in range(2))
        self.write_index, self.next_write_index = (gpu.empty((1,), np.int64) for _ in range(2))
        self.best = gpu.empty((LAST_POSITIONS, 1), np.int64)
        self._logits = gpu.empty((LAST_POSITIONS, info.vocab), np.float32)
        self.is_text = gpu.upload(np.ones((1, LAST_POSITIONS, 1), np.bool_))
        self.no_rows = gpu.zeros((1, LAST_POSITIONS, info.hidden_size), self.float)
        self._between: dict[tuple[str, int], Buffer] = {}
        self._captured: Callable[[], None] | None = None
        self._steps = 0
        self._rows = 0  # positions of the last pass whose logits are available
        self._on_device: int | None = (
            None  # the next token, if the device chose it and will feed it to itself
        )

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(buffer.nbytes for buffer in self.cache.values())

    # -- prefill ---------------------------------------------------------------------------------------------

    def feed(self, prompt: GpuPrompt | np.ndarray) -> None:
        """Prefill with a prompt that is embedded on the device, or with given embeddings (S, D)."""
        if not isinstance(prompt, GpuPrompt):
            prompt = GpuPrompt([], self.gpu.upload(np.asarray(prompt), dtype=self.float), [])
        count, first, visual = len(prompt), len(prompt.before), len(prompt.visual)
        ids = np.zeros((1, count), np.int64)
        ids[0, :first], ids[0, first + visual :] = prompt.before, prompt.after
        is_text = np.ones((1, count, 1), np.bool_)
        is_text[0, first : first + visual] = False
        rows = self.gpu.empty((1, count, self.info.hidden_size), self.float)
        self._place(prompt.visual, rows.reshape(count, self.info.hidden_size).rows(first, visual))
        self._read(count, self.gpu.upload(ids), self.gpu.upload(is_text), rows)

    def _place(self, visual: Any, into: Buffer) -> None:
        """Copy visual tokens into their rows of the prompt."""
        if isinstance(visual, Buffer) and visual.dtype == into.dtype:
            self.gpu.copy(visual, into)
        else:
            self.gpu.upload(np.asarray(visual), into)

    # -- decode ----------------------------------------------------------------------------------------------

    def verify(self, tokens: list[int]) -> None:
        """As Sequence says; a single token is a decode step, captured as a CUDA graph from the second on."""
        if len(tokens) == 1:
            self._step(None if tokens[0] == self._on_device else tokens[0])
            return
        count, width = len(tokens), self.info.hidden_size
        rows = self.no_rows.reshape(LAST_POSITIONS, width).rows(0, count).reshape(1, count, width)
        is_text = self.is_text.reshape(LAST_POSITIONS).rows(0, count).reshape(1, count, 1)
        self._read(count, self.gpu.upload(np.array([tokens], np.int64)), is_text, rows)

    def _step(self, token: int | None) -> None:
        """Run a decode step for one token; None: the one that the device chose."""
        if self.length + 1 > self.capacity:
            raise cache_full_error(self.length, self.capacity, 1)
        if token is not None:
            self.gpu.upload(np.array([[token]], np.int64), self.next_token)
        if self._captured is not None:
            self._captured()
        elif self._steps and all(stage.captures for stage in self.stages):
            self._captured = self.gpu.capture(self._decode)  # not the first step: libraries initialise in it
            self._captured()
        else:
            self._decode()
        self._steps += 1
        self._passed(1)

    def _decode(self) -> None:
        """Queue one step over the same buffers: its inputs are the last step's outputs."""
        self.gpu.copy(self.next_token, self.token)
        self.gpu.copy(self.next_position, self.position)
        self.gpu.copy(self.next_write_index, self.write_index)
        width = self.info.hidden_size
        rows = self.no_rows.reshape(LAST_POSITIONS, width).rows(0, 1).reshape(1, 1, width)
        is_text = self.is_text.reshape(LAST_POSITIONS).rows(0, 1).reshape(1, 1, 1)
        self._queue(1, self.token, is_text, rows, self.position, self.write_index, self.decode_profile)

    # -- one pass --------------------------------------------------------------------------------------------

    def _read(self, count: int, ids: Buffer, is_text: Buffer, rows: Buffer) -> None:
        """A pass over `count` positions: ids where is_text, rows elsewhere."""
        if count < 1 or self.length + count > self.capacity:
            raise cache_full_error(self.length, self.capacity, count)
        positions = self.gpu.upload(np.arange(self.length, self.length + count, dtype=np.int64)[None])
        write_index = self.gpu.upload(np.array([self.length], np.int64))
        self._queue(count, ids, is_text, rows, positions, write_index, PREFILL)
        self._passed(count)

    def _passed(self, count: int) -> None:
        self.length += count
        self._rows, self._on_device = min(count, LAST_POSITIONS), None

    def _queue(
        self,
        count: int,
        ids: Buffer,
        is_text: Buffer,
        rows: Buffer,
        positions: Buffer,
        write_index: Buffer,
        profile: int,
    ) -> None:
        given = min(count, LAST_POSITIONS)
        values: dict[str, Any] = {
            "token_ids": ids,
            "is_text": is_text,
            "inputs_embeds": rows,
            "position_ids": positions,
            "write_index": write_index,
        }
        values |= {f"past.{name}": buffer for name, buffer in self.cache.items()}
        results = {
            "next_token": self.next_token,
            "next_position": self.next_position,
            "next_write_index": self.next_write_index,
            "best": self.best.rows(0, given),
            "logits": self._logits.rows(0, given),
        }
        results |= {f"present.{name}": buffer for name, buffer in self.cache.items()}
        for stage in self.stages:
            wanted = [name for name in stage.outputs if name not in TOP]
            outputs = {
                name: results[name] if name in results else self._buffer_between(name, count, stage)
                for name in wanted
            }
            stage.run({name: values[name] for name in stage.dtypes}, outputs, profile)
            values |= outputs

    def _buffer_between(self, name: str, count: int, stage: Any) -> Buffer:
        """The value that one piece of the decoder passes to the next: hidden states, or the mask."""
        key = (name, count)
        if key not in self._between:
            shape = (1, 1, count, self.capacity) if name == "mask" else (1, count, self.info.hidden_size)
            self._between[key] = self.gpu.empty(shape, stage.outputs[name])
        return self._between[key]

    # -- results ---------------------------------------------------------------------------------------------

    def logits(self) -> np.ndarray:
        """As Sequence says; copies them to the host."""
        return self.gpu.download(self._logits.rows(0, self._rows))

    def last_logits(self) -> np.ndarray:
        """Logits (V,) float32 of the last position, copied to the host."""
        row: np.ndarray = self.gpu.download(self._logits.rows(self._rows - 1, 1))[0]
        return row

    def chosen(self, sampler: Sampler, ids: list[int], count: int) -> Iterable[int]:
        """As Sequence says. A greedy step copies one token id to the host and nothing else."""
        if not sampler.greedy:
            return (sampler(self.last_logits(), ids) for _ in range(1))
        if count > 1:
            return [int(i) for i in self.gpu.download(self.best)[:count, 0]]
        self._on_device = int(self.gpu.download(self.next_token)[0, 0])
        return [self._on_device]

    def forget(self, count: int) -> None:
        """As Sequence says."""
        check_forget(self.length, count)
        self.length -= count
        self._on_device = None
        self.gpu.upload(np.array([[self.length]], np.int64), self.next_position)
        self.gpu.upload(np.array([self.length], np.int64), self.next_write_index)

    def restart(self) -> None:
        """Empty the cache for the next prompt; keep the buffers of single steps and the captured step."""
        self.length, self._rows, self._on_device = 0, 0, None
        self._between = {key: buffer for key, buffer in self._between.items() if key[1] == 1}
