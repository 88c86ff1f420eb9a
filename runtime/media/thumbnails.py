"""Small copies of frames for display: attention maps, alerts, saved pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ppllava_edge.runtime.media.readers import FrameReader

MAX_SIDE = 448  # pixels


def read_pictures(reader: FrameReader, indices: Sequence[int]) -> dict[int, np.ndarray]:
    """Read frames by number and shrink them. Safe to call from several threads.

    Returns:
        Frame number → RGB uint8 (h, w, 3).
    """
    with reader.reading:
        return {
            frame.number: small_picture(frame.image) for frame in reader.frames(lambda r: sorted(indices))
        }


def small_picture(image: np.ndarray) -> np.ndarray:
    """Shrink an RGB uint8 image (H, W, 3) to at most 448 pixels a side. Returns a copy."""
    from PIL import Image

    height, width = image.shape[:2]
    longest = max(height, width)
    if longest <= MAX_SIDE:
        return np.array(image)
    size = max(1, round(width * MAX_SIDE / longest)), max(1, round(height * MAX_SIDE / longest))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))
