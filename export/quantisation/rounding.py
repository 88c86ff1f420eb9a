"""Rounding a weight matrix to INT8 or INT4: symmetric (zero point 0, TensorRT's rule), scales by least error.

Matrices are worked on some rows at a time and on every core, so that a large one never exists in float32 as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

CHUNK = 1 << 18  # values worked on at once: they stay in the processor's cache
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # shares of a block's largest value that its scale may be made for
MIN_SCALE = 2.0**-14  # the smallest normal float16


@dataclass(frozen=True)
class Rounded:
    """values int8 (K, N), of INT4 packed uint8 (K, N/2): two neighbours of a row in a byte, the low half first. scales: (N,) of INT8 per
    column, (K / block, N) of blocks along K. error: sum of squared differences, signal: sum of squares, both weighted by importance."""

    values: np.ndarray
    scales: np.ndarray
    error: float
    signal: float

    @property
    def sqnr(self) -> float:
        """Signal to quantisation noise, decibels; infinite when nothing was lost."""
        return float(10 * np.log10(self.signal / self.error)) if self.error > 0 else float("inf")


def round_int8(weight: np.ndarray, scale_dtype: str, rows: np.ndarray | None = None) -> Rounded:
    """weight (K, N), any float → INT8 with a scale per column. rows (K,): factors that the rows are multiplied by first.

    No clipping: at 8 bits the largest value costs little, and losing it may cost much.
    """
    columns, factor = weight.T, None if rows is None else rows.astype(np.float32)
    inputs, outputs = weight.shape
    values, scales = np.empty((inputs, outputs), np.int8), np.empty(outputs, scale_dtype)

    def work(part: slice) -> tuple[float, float]:
        w = _float32(columns[part], factor)
        scale = _storable(np.abs(w).max(axis=1) / np.float32(127), scale_dtype)
        q = np.rint(w / scale[:, None]).clip(-127, 127)
        values[:, part], scales[part] = q.astype(np.int8).T, scale
        return _sums(w, q * scale[:, None])

    error, signal = _in_parts(work, outputs, inputs)
    return Rounded(values, scales, error, signal)


def round_int4(
    weight: np.ndarray,
    block: int,
    scale_dtype: str,
    rows: np.ndarray | None = None,
    importance: np.ndarray | None = None,
) -> Rounded:
    """weight (K, N), any float → INT4 in blocks of `block` rows, each block of each column with a scale, found by a search over clipping.

    K must be a multiple of block, N even. rows (K,): factors that the rows are multiplied by first. importance (K,): how much an error in
    a row matters (the mean square of the activation that meets it); equal if None.
    """
    columns, factor = weight.T, None if rows is None else rows.astype(np.float32)
    inputs, outputs = weight.shape
    blocks = inputs // block
    packed, scales = np.empty((inputs, outputs // 2), np.uint8), np.empty((blocks, outputs), scale_dtype)
    matters = (
        None
        if importance is None
        else (importance / max(importance.mean(), 1e-30)).astype(np.float32).reshape(1, blocks, block)
    )

    def work(part: slice) -> tuple[float, float]:
        w = _float32(columns[part], factor).reshape(-1, blocks, block)
        scale = _best_scale(w, matters, scale_dtype)
        q = np.rint(w / scale[..., None]).clip(-8, 7)
        sums = _sums(w, q * scale[..., None], matters)
        nibbles = q.astype(np.int8).reshape(len(w), inputs)
        both = (nibbles[0::2] & 15) | (nibbles[1::2] << 4)
        packed[:, part.start // 2 : part.stop // 2], scales[:, part] = both.view(np.uint8).T, scale.T
        return sums

    error, signal = _in_parts(work, outputs, inputs, multiple=2)
    return Rounded(packed, scales, error, signal)


def _best_scale(w: np.ndarray, matters: np.ndarray | None, dtype: str) -> np.ndarray:
    """w (n, blocks, block) → scales (n, blocks) with the least squared error among the clipping shares."""
    largest = np.abs(w).max(axis=2)
    best = best_error = None
    for clip in CLIPS:
        scale = _storable(largest * np.float32(clip / 7), dtype)
        difference = w / scale[..., None]
        q = np.rint(difference)
        np.clip(q, -8, 7, out=q)
        difference -= q
        np.square(difference, out=difference)
        if matters is not None:
            difference *= matters
        error = difference.sum(axis=2) * scale * scale
        if best is None or best_error is None:
            best, best_error = scale, error
        else:
            better = error < best_error
            best, best_error = np.where(better, scale, best), np.where(better, error, best_error)
    assert best is not None
    return best


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Packed bytes → int8 values of that shape."""
    flat = packed.reshape(-1)
    both = np.stack([(flat << 4).view(np.int8) >> 4, flat.view(np.int8) >> 4], axis=1)
    return both.reshape(-1)[: int(np.prod(shape))].reshape(shape)


def _float32(columns: np.ndarray, factor: np.ndarray | None) -> np.ndarray:
    w = np.ascontiguousarray(columns, np.float32)
    return w if factor is None else w * factor


def _storable(scale: np.ndarray, dtype: str) -> np.ndarray:
    """Scales as they will be stored, back in float32: rounding then uses the very scale that dequantisation will."""
    return np.maximum(scale, MIN_SCALE).astype(dtype).astype(np.float32)


def _sums(w: np.ndarray, restored: np.ndarray, matters: np.ndarray | None = None) -> tuple[float, float]:
    error, signal = np.square(restored - w), np.square(w)
    if matters is not None:
        error, signal = error * matters, signal * matters
    return float(error.sum(dtype=np.float64)), float(signal.sum(dtype=np.float64))


def _in_parts(
    work: Callable[[slice], tuple[float, float]], count: int, width: int, multiple: int = 1
) -> tuple[float, float]:
    """work over slices of 0…count on every core → its sums, added in a fixed order."""
    step = max(CHUNK // width // multiple, 1) * multiple
    parts = [slice(first, min(first + step, count)) for first in range(0, count, step)]
    if len(parts) == 1:
        return work(parts[0])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = list(pool.map(work, parts))
    return sum(error for error, _ in sums), sum(signal for _, signal in sums)
