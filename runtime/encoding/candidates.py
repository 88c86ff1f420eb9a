"""Frames that were encoded so that a question can choose among them (guided selection)."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.pipeline.base import BasePipeline
from ppllava_edge.runtime.vision.guided_selection import choose_moments, frame_scores

IN_MEMORY = 512 << 20  # bytes of states or features; more are mapped from a temporary file


def array_for(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array in memory or, above 512 MiB, mapped from an unnamed file that is deleted with it.

    Raises:
        MediaError: If the folder for temporary files (TMPDIR) has no room for it.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size <= IN_MEMORY:
        with contextlib.suppress(MemoryError):
            return np.empty(shape, dtype)
    try:
        with tempfile.TemporaryFile(prefix="ppllava-") as file:
            # All of it now: writing to a mapping for which the disk has no room kills the process (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise MediaError(
            f"{size / 1e6:.0f} MB for the encoded frames can't be written to {tempfile.gettempdir()} "
            f"({error.strerror}): use fewer candidates, or set TMPDIR to a folder on a disk with room"
        ) from None


class Candidates:
    """Encoded frames to choose from.

    Args:
        pipeline: The model.
        states: (n, S, P+1, C), the trunk's output.
        features: (n, P, C), the temporal branch's output over neighbouring frames; None: computed here.
    """

    def __init__(self, pipeline: BasePipeline, states: np.ndarray, features: np.ndarray | None = None):
        self.pipeline, self.states = pipeline, states
        self.features = features if features is not None else self._branch_in_chunks()

    def _chunks(self) -> Iterator[slice]:
        """Runs of neighbouring frames that the temporal adapter takes at once."""
        vision = self.pipeline.manifest.vision
        step = vision.max_frames or vision.default_frames
        return (slice(i, i + step) for i in range(0, len(self.states), step))

    def _branch_in_chunks(self) -> np.ndarray:
        features: np.ndarray | None = None
        for chunk in self._chunks():
            part = np.asarray(self.pipeline.branch(self.states[chunk]))
            if features is None:
                features = array_for((len(self.states), *part.shape[1:]), part.dtype)
            features[chunk] = part
        assert features is not None
        return features

    def scores(self, q: Any) -> np.ndarray:
        """Score each frame by how much it shows of what the question names: q (1, E) → (n,) float32."""
        chunks = (np.ascontiguousarray(self.features[chunk]) for chunk in self._chunks())
        return np.concatenate([frame_scores(self.pipeline.similarity(chunk, q)) for chunk in chunks])

    def choose(self, q: Any, count: int, window: int) -> tuple[Any, list[int]]:
        """Choose the frames that a question is about.

        Args:
            q: (1, E), the encoded question.
            count: Frames to choose.
            window: Frames of a pooling window; neighbours that share one are chosen together.

        Returns:
            Features (count, P, C), from running the temporal branch over the chosen frames again, and their
            ascending positions among the candidates.
        """
        chosen = choose_moments(self.scores(q), count, window)
        return self.pipeline.branch(np.ascontiguousarray(self.states[chosen])), chosen
