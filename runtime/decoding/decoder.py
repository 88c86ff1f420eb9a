"""The interface of all decoders: start sequences, prefill, generate."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np

from ppllava_edge.engines.bundle.engine_manifest import LAST_POSITIONS
from ppllava_edge.engines.bundle.manifest import DecoderInfo
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.runtime.decoding.generate import generate_ids
from ppllava_edge.runtime.decoding.sequence import Sequence
from ppllava_edge.runtime.language.prompt_lookup import (
    LOOKUP_SKIPPED,
    MAX_DISAGREEMENT,
    PromptLookup,
    disagreement,
)
from ppllava_edge.runtime.language.sampling import Sampling


class Decoder(ABC):
    """A decoder engine. Several sequences may be active at once, each with a KV cache of its own.

    Attributes:
        info: Sizes of the decoder.
        verify_hint: The end of the error for drafts that can't be verified: what to do.
    """

    verify_hint = ""

    def __init__(self, info: DecoderInfo):
        self.info = info
        # Re-entrant: an abandoned answer may be garbage-collected, and return its cache, in any thread.
        self._lock = threading.RLock()
        self._disagreement: float | None = None
        self._closed = False
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()

    @abstractmethod
    def start(self, length: int, new_tokens: int) -> Sequence:
        """A sequence with room for a prompt of `length` tokens and `new_tokens` more.

        Raises:
            PromptError: If the prompt alone is too long for the model's context; says by how much.
        """

    def finish(self, sequence: Any) -> None:  # noqa: B027  (by default nothing is reused)
        """Return a sequence; its buffers may serve the next one."""

    @property
    @abstractmethod
    def verifies(self) -> bool:
        """Whether a pass gives the logits of several positions, so that drafts can be verified."""

    def disagreement(self) -> float:
        """How far a pass over 8 positions deviates from 8 single steps, in standard deviations of logits.

        Measured once, on the first call.
        """
        if self._disagreement is None:
            tokens = [i % self.info.vocab for i in range(3, 3 + 2 * LAST_POSITIONS)]
            first, following = tokens[:LAST_POSITIONS], tokens[LAST_POSITIONS:]
            sequence = self.start(len(tokens), 1)
            sequence.verify(first)
            single = []
            for token in following:
                sequence.verify([token])
                single.append(sequence.logits()[-1])
            sequence.forget(LAST_POSITIONS)
            sequence.verify(following)
            self._disagreement = disagreement(single, sequence.logits())
            self.finish(sequence)
        return self._disagreement

    def cache_bytes(self) -> int:
        """Bytes of all KV caches: of answers under way, of chats, and the free one that is kept."""
        with self._lock:
            return sum(cache.bytes for cache in self._caches)

    def close(self) -> None:
        """Release the free cache, and keep none from now on. Sequences under way may go on."""
        self._closed = True
        self._release_free()

    def _track(self, cache: Any) -> None:
        """Count this cache's `bytes` as long as it lives."""
        with self._lock:
            self._caches.add(cache)

    @abstractmethod
    def _release_free(self) -> None:
        """Release the free caches."""

    def prefill(self, prompt: Any) -> np.ndarray:
        """A prompt, as Pipeline.prompt returns it → logits (V,) float32 of its last position."""
        sequence = self.start(len(prompt), 1)
        try:
            sequence.feed(prompt)
            logits: np.ndarray = sequence.logits()[-1]
            return logits
        finally:
            self.finish(sequence)

    def check_lookup(self, sampling: Sampling) -> None:
        """Raise EngineError or PromptError if the engine, or the sampling, can't verify drafts."""
        if not self.verifies:
            raise EngineError(
                f"looking ahead needs an engine that verifies several tokens at once{self.verify_hint}"
            )

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int,
        stop_ids: Iterable[int] = (),
        sampling: Sampling | None = None,
        lookup: PromptLookup | None = None,
        sequence: Any = None,
    ) -> Generator[int, None, None]:
        """Generate token ids after a prompt.

        Args:
            prompt: As Pipeline.prompt returns it.
            max_new_tokens: Maximum number of ids to yield.
            stop_ids: Ids that end the answer; the one that does is yielded too.
            sampling: Greedy by default.
            lookup: Draft tokens and verify several in a pass. Skipped, with a note in it, where a pass over
                several positions and single steps compute different logits.
            sequence: The caller's sequence to continue, from `start`. None: a new one for this answer alone.

        Yields:
            Token ids, until a stop id, max_new_tokens, or the end of the context or of the engine's cache.

        Raises:
            PromptError: If the prompt is too long.
            EngineError: If the engine fails, or can't verify drafts.
        """
        if max_new_tokens < 1:
            return
        sampling = sampling or Sampling()
        if lookup is not None:
            self.check_lookup(sampling)
            if self.disagreement() > MAX_DISAGREEMENT:
                lookup.note, lookup = LOOKUP_SKIPPED, None
        own = sequence is None
        sequence = self.start(len(prompt), max_new_tokens) if own else sequence
        try:
            yield from generate_ids(sequence, prompt, max_new_tokens, sampling.sampler(), stop_ids, lookup)
        except GeneratorExit:
            raise
        except BaseException:
            sequence.failed = True
            raise
        finally:
            if own:
                self.finish(sequence)
