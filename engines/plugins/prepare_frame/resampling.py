"""Pillow's bicubic resampling weights for 8-bit images."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

PRECISION = 22  # fraction bits of the weights, as in Pillow
SUPPORT = 2.0  # radius of the bicubic filter, in input pixels when enlarging


def bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -0.5, as in Pillow's BICUBIC."""
    x = np.abs(x)
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@cache
def resampling_weights(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights for resampling one axis, as in Pillow's precompute_coeffs and normalize_coeffs_8bpc.

    The filter is stretched when shrinking; a pixel's weights sum to one before they are rounded.

    Args:
        size: Pixels along the axis.
        new_size: Pixels of the result.

    Returns:
        Bounds (new_size, 2) int32: the first input pixel and the number of them. Weights (new_size, taps)
        int32 in fixed point with PRECISION fraction bits.
    """
    scale = size / new_size
    stretch = max(scale, 1.0)
    support = SUPPORT * stretch
    taps = math.ceil(support) * 2 + 1
    bounds = np.zeros((new_size, 2), np.int32)
    weights = np.zeros((new_size, taps), np.int32)
    for i in range(new_size):
        centre = (i + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), size)
        row = bicubic((np.arange(first, last) - centre + 0.5) / stretch)
        total = 0.0
        for value in row:  # in Pillow's order, which decides the last bit
            total += float(value)
        scaled = row / total * (1 << PRECISION)
        bounds[i] = first, last - first
        weights[i, : last - first] = np.trunc(np.where(scaled < 0, scaled - 0.5, scaled + 0.5))
    return bounds, weights
