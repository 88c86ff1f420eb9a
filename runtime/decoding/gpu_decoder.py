"""The decoder on a GPU: sequences over one engine's stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.bundle.engine_manifest import Engine
from ppllava_edge.engines.bundle.manifest import DecoderInfo
from ppllava_edge.engines.errors import PromptError
from ppllava_edge.runtime.decoding.capacity import cache_capacity, check_context
from ppllava_edge.runtime.decoding.decoder import Decoder
from ppllava_edge.runtime.decoding.gpu_cache import DECODE, PREFILL, GpuSequence
from ppllava_edge.runtime.decoding.gpu_growing_cache import GrowingGpuSequence
from ppllava_edge.runtime.decoding.sequence import Sequence
from ppllava_edge.runtime.language.sampling import Sampling


class _EngineDecoder(Decoder):
    """The common base of decoders over an engine in device memory.

    Args:
        stages: The opened decoder engine, whole or in pieces that follow one another.
        info: Sizes of the decoder.
        engine: Its description: profiles, fixed capacity.
        gpu: The GPU that holds everything.
        embed: Token ids (k) → embeddings (k, D) float32, on the host.
    """

    def __init__(
        self,
        stages: list[Any],
        info: DecoderInfo,
        engine: Engine,
        gpu: CudaDevice,
        embed: Callable[[list[int]], np.ndarray],
    ):
        super().__init__(info)
        self.stages, self.gpu, self.embed = stages, gpu, embed
        self.fixed: int | None = engine.details.get("capacity")
        self.decode_profile = DECODE if engine.details.get("decoder_profiles", 2) == 2 else PREFILL
        self._rebuild = f"ppllava-build {engine.folder.parent.parent} --target {engine.target} --capacity"

    def prompt_too_long(self, length: int) -> PromptError:
        """The error for a prompt that the engine's cache can't hold."""
        holds = self.fixed or self.info.context
        return PromptError(
            f"the prompt has {length} tokens; this engine's cache holds {holds}: "
            f"use fewer frames, or {self._rebuild} {length + 256}"
        )


class GpuDecoder(_EngineDecoder):
    """A decoder whose cache is written in place.

    A finished sequence leaves its buffers and its captured step to the next.
    """

    _idle: list[GpuSequence]

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._idle = []

    @property
    def verifies(self) -> bool:
        """As Decoder says."""
        return True

    def check_lookup(self, sampling: Sampling) -> None:
        """As Decoder says: drafts are verified against the device's own choice, the likeliest token."""
        if not sampling.greedy:
            raise PromptError(
                "looking ahead on a GPU works with greedy answers only (temperature 0, no repetition penalty)"
            )

    def start(self, length: int, new_tokens: int) -> GpuSequence:
        """As Decoder says. Raises PromptError also if the prompt is too long for the engine."""
        check_context(length, self.info.context)
        if self.fixed and length >= self.fixed:
            raise self.prompt_too_long(length)
        capacity = self.fixed or cache_capacity(length + new_tokens, self.info.context)
        with self._lock:
            for sequence in self._idle:
                if sequence.capacity == capacity:
                    self._idle.remove(sequence)
                    sequence.restart()
                    return sequence
            self._idle.clear()
        sequence = GpuSequence(self.stages, self.info, capacity, self.gpu, self.decode_profile)
        self._track(sequence)
        return sequence

    def finish(self, sequence: Any) -> None:
        """As Decoder says."""
        with self._lock:
            self._idle = [] if self._closed or sequence.failed else [sequence]

    def _release_free(self) -> None:
        with self._lock:
            self._idle = []


class GrowingGpuDecoder(_EngineDecoder):
    """A decoder over lowered graphs (TensorRT 10.3), whose cache grows."""

    verify_hint = "; lowered graphs don't"

    @property
    def verifies(self) -> bool:
        """As Decoder says."""
        return False

    def start(self, length: int, new_tokens: int) -> Sequence:
        """As Decoder says; the sequence has room for as much as the engine's cache holds."""
        capacity = min(self.fixed or self.info.context, self.info.context)
        if length >= capacity:
            raise self.prompt_too_long(length)
        sequence = GrowingGpuSequence(
            self.stages, self.info, capacity, self.gpu, self.decode_profile, self.embed
        )
        self._track(sequence)
        return sequence

    def _release_free(self) -> None:
        """No cache is kept."""
