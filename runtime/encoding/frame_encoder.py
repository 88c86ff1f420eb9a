"""Encode frames while they are decoded: a background thread preprocesses ahead of the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from ppllava_edge.runtime.encoding.candidates import array_for
from ppllava_edge.runtime.media.prefetch import prefetch
from ppllava_edge.runtime.media.readers import FrameReader
from ppllava_edge.runtime.media.thumbnails import small_picture
from ppllava_edge.runtime.pipeline.base import BasePipeline
from ppllava_edge.runtime.pipeline.clip import ClipEncoder
from ppllava_edge.runtime.vision.preprocess import preprocess_video

Progress = Callable[[str, int, int], None]  # what ("decode" or "vision"), frames done, total
Prepared = tuple[int, float, np.ndarray]  # a frame's number, seconds, pixels (3, size, size)

BATCH = 4  # frames encoded at once
MAX_PICTURES = 64  # kept per clip; the others are read again on demand


class EngineLock(Protocol):
    """Held for one call of the engine (session/admission.py)."""

    def hold(self) -> AbstractContextManager[Any]:
        """Wait for the lock; released on leaving."""


class FrameEncoder:
    """Encodes frames as they are decoded, a batch at a time.

    Args:
        pipeline: The model.
        engine_lock: Held while the engine encodes a batch.
        reader: The source.
        to_array: Move states into one array (mapped from a file if it is large), for candidates.

    Attributes:
        clip: States of the frames, unless to_array.
        times: Frame number → seconds.
        pictures: Frame number → small picture, for the first 64 frames.
        seconds: Spent encoding.
    """

    def __init__(self, pipeline: BasePipeline, engine_lock: EngineLock, reader: FrameReader, to_array: bool):
        self.pipeline, self.engine_lock, self.reader = pipeline, engine_lock, reader
        self.to_array = to_array
        self.clip = ClipEncoder(pipeline)
        self.times, self.pictures = dict[int, float](), dict[int, np.ndarray]()
        self.seconds = 0.0
        self._encoded = 0
        self._array: np.ndarray | None = None
        self._rows: dict[int, int] = {}

    def run(self, choice: Callable[[FrameReader], list[int]], progress: Progress | None) -> None:
        """Read the chosen frames and encode them. Raises MediaError if there are none."""
        frames = prefetch(self._prepare(choice), 2 * BATCH)
        batch, more = list[tuple[int, np.ndarray]](), True
        try:
            while more:
                more = self._next(frames, batch)
                wanted = len(set(self.reader.indices))
                if batch and (len(batch) == BATCH or not more):
                    self._encode(batch, wanted, more)
                    batch.clear()
                if progress:
                    progress("decode", min(len(self.times), wanted), wanted)
                    progress("vision", min(self._encoded, wanted), wanted)
        finally:
            frames.close()

    def _prepare(self, choice: Callable[[FrameReader], list[int]]) -> Iterator[Prepared]:
        """Decode and preprocess, in the prefetch thread."""
        preprocessing = self.pipeline.manifest.preprocessing
        for frame in self.reader.frames(choice):
            if len(self.pictures) < MAX_PICTURES:
                self.pictures[frame.number] = small_picture(frame.image)
            yield frame.number, frame.seconds, preprocess_video([frame.image], preprocessing)[0]

    def _next(self, frames: Generator[Prepared, None, None], batch: list[tuple[int, np.ndarray]]) -> bool:
        """Append the next frame to the batch. Returns whether there was one."""
        item = next(frames, None)
        if item is None:
            return False
        number, seconds, pixels = item
        self.times[number] = seconds
        batch.append((number, pixels))
        return True

    def _encode(self, batch: list[tuple[int, np.ndarray]], wanted: int, more: bool) -> None:
        started = time.perf_counter()
        pixels, numbers = np.stack([pixels for _, pixels in batch]), [number for number, _ in batch]
        self._encoded += len(batch)
        self.pipeline.load("encoding")
        with self.engine_lock.hold():
            self.clip.add(pixels, numbers, more=more and self._encoded < wanted)
        if self.to_array:
            self._move_to_array(wanted)
        self.seconds += time.perf_counter() - started

    def _move_to_array(self, capacity: int) -> None:
        for number, state in self.clip.states.items():
            state = np.asarray(state)
            row = self._rows.setdefault(number, len(self._rows))
            if self._array is None:
                self._array = array_for((capacity, *state.shape[1:]), state.dtype)
            elif row >= len(self._array):  # a damaged file's frames were chosen again
                larger = array_for((capacity + row, *state.shape[1:]), state.dtype)
                larger[: len(self._array)] = self._array
                self._array = larger
            self._array[row] = state[0]
        self.clip.states.clear()

    def states(self, numbers: Sequence[int]) -> np.ndarray:
        """States (n, S, P+1, C) of these frames, from the array."""
        assert self._array is not None
        rows = [self._rows[number] for number in numbers]
        in_order = rows == list(range(len(rows)))
        return self._array[: len(rows)] if in_order else self._array[rows]
