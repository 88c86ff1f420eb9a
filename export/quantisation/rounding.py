"""Round a weight matrix to INT8 or INT4: symmetric (zero point 0, as TensorRT requires), with least error.

Matrices are processed in chunks of columns on all cores, so that a large one never exists in float32 as a
whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

CHUNK = 1 << 18  # values per chunk: they stay in the processor's cache
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # candidate clipping ranges, as shares of a block's largest value
MIN_SCALE = 2.0**-14  # the smallest normal float16


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix.

    Attributes:
        values: INT8: int8 (K, N). INT4: uint8 (K, N / 2), two neighbours of a row per byte, the low half
            first.
        scales: INT8: (N,), one per column. INT4: (K / block, N).
        error: Sum of squared differences, weighted by importance.
        signal: Sum of squares, weighted by importance.
    """

    values: np.ndarray
    scales: np.ndarray
    error: float
    signal: float

    @property
    def sqnr(self) -> float:
        """Signal to quantisation noise, decibels; infinite if rounding was exact."""
        return float(10 * np.log10(self.signal / self.error)) if self.error > 0 else float("inf")


def round_int8(weight: np.ndarray, scale_dtype: str, rows: np.ndarray | None = None) -> Rounded:
    """Round to INT8 with a scale per column.

    Nothing is clipped: at 8 bits, keeping the largest value costs little accuracy, but clipping it may cost
    much.

    Args:
        weight: (K, N), any float.
        scale_dtype: Type of the stored scales.
        rows: Factors (K,) by which the rows are multiplied before rounding, or None.
    """
    columns = weight.T
    factors = None if rows is None else rows.astype(np.float32)
    inputs, outputs = weight.shape
    values = np.empty((inputs, outputs), np.int8)
    scales = np.empty(outputs, scale_dtype)

    def round_part(part: slice) -> tuple[float, float]:
        w = _float32(columns[part], factors)
        scale = _as_stored(np.abs(w).max(axis=1) / np.float32(127), scale_dtype)
        q = np.rint(w / scale[:, None]).clip(-127, 127)
        values[:, part] = q.astype(np.int8).T
        scales[part] = scale
        return _error_and_signal(w, q * scale[:, None])

    error, signal = _run_in_parts(round_part, outputs, inputs)
    return Rounded(values, scales, error, signal)


def round_int4(
    weight: np.ndarray,
    block: int,
    scale_dtype: str,
    rows: np.ndarray | None = None,
    importance: np.ndarray | None = None,
) -> Rounded:
    """Round to INT4 with one scale per column and block of rows, chosen by a search over clipping ranges.

    Args:
        weight: (K, N), any float; K a multiple of `block`, N even.
        block: Rows per scale.
        scale_dtype: Type of the stored scales.
        rows: Factors (K,) by which the rows are multiplied before rounding, or None.
        importance: How much an error in a row matters, (K,): the mean square of the activation it is
            multiplied with. None: all rows are equal.
    """
    columns = weight.T
    factors = None if rows is None else rows.astype(np.float32)
    inputs, outputs = weight.shape
    blocks = inputs // block
    packed = np.empty((inputs, outputs // 2), np.uint8)
    scales = np.empty((blocks, outputs), scale_dtype)
    error_weights = None
    if importance is not None:
        relative = importance / max(importance.mean(), 1e-30)
        error_weights = relative.astype(np.float32).reshape(1, blocks, block)

    def round_part(part: slice) -> tuple[float, float]:
        w = _float32(columns[part], factors).reshape(-1, blocks, block)
        scale = _best_scale(w, error_weights, scale_dtype)
        q = np.rint(w / scale[..., None]).clip(-8, 7)
        nibbles = q.astype(np.int8).reshape(len(w), inputs)
        pairs = (nibbles[0::2] & 15) | (nibbles[1::2] << 4)
        packed[:, part.start // 2 : part.stop // 2] = pairs.view(np.uint8).T
        scales[:, part] = scale.T
        return _error_and_signal(w, q * scale[..., None], error_weights)

    error, signal = _run_in_parts(round_part, outputs, inputs, multiple=2)
    return Rounded(packed, scales, error, signal)


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Unpack INT4 values.

    Args:
        packed: Two values per byte, the low half first.
        shape: The shape of the result.

    Returns:
        int8 values of that shape.
    """
    flat = packed.reshape(-1)
    pairs = np.stack([(flat << 4).view(np.int8) >> 4, flat.view(np.int8) >> 4], axis=1)
    return pairs.reshape(-1)[: int(np.prod(shape))].reshape(shape)


def _best_scale(w: np.ndarray, error_weights: np.ndarray | None, dtype: str) -> np.ndarray:
    """w (n, blocks, block) → scales (n, blocks): those of CLIPS with the least squared error."""
    largest = np.abs(w).max(axis=2)
    best = _as_stored(largest * np.float32(CLIPS[0] / 7), dtype)
    best_error = _squared_error(w, best, error_weights)
    for clip in CLIPS[1:]:
        scale = _as_stored(largest * np.float32(clip / 7), dtype)
        error = _squared_error(w, scale, error_weights)
        better = error < best_error
        best = np.where(better, scale, best)
        best_error = np.where(better, error, best_error)
    return best


def _squared_error(w: np.ndarray, scale: np.ndarray, error_weights: np.ndarray | None) -> np.ndarray:
    """The error of rounding each block with its scale, (n, blocks). In place where possible, for speed."""
    difference = w / scale[..., None]
    q = np.rint(difference)
    np.clip(q, -8, 7, out=q)
    difference -= q
    np.square(difference, out=difference)
    if error_weights is not None:
        difference *= error_weights
    return difference.sum(axis=2) * scale * scale


def _float32(columns: np.ndarray, factors: np.ndarray | None) -> np.ndarray:
    w = np.ascontiguousarray(columns, np.float32)
    return w if factors is None else w * factors


def _as_stored(scale: np.ndarray, dtype: str) -> np.ndarray:
    """Scales rounded to their stored type, as float32: rounding must use the scales of dequantisation."""
    return np.maximum(scale, MIN_SCALE).astype(dtype).astype(np.float32)


def _error_and_signal(
    w: np.ndarray, restored: np.ndarray, error_weights: np.ndarray | None = None
) -> tuple[float, float]:
    error = np.square(restored - w)
    signal = np.square(w)
    if error_weights is not None:
        error = error * error_weights
        signal = signal * error_weights
    return float(error.sum(dtype=np.float64)), float(signal.sum(dtype=np.float64))


def _run_in_parts(
    function: Callable[[slice], tuple[float, float]], count: int, width: int, multiple: int = 1
) -> tuple[float, float]:
    """Run a function over slices of 0…count on all cores and add its results in a fixed order."""
    step = max(CHUNK // width // multiple, 1) * multiple
    parts = [slice(first, min(first + step, count)) for first in range(0, count, step)]
    if len(parts) == 1:
        return function(parts[0])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = list(pool.map(function, parts))
    return sum(error for error, _ in sums), sum(signal for _, signal in sums)
