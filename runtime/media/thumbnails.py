"""thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ppllava_edge.runtime.media.readers import FrameReader

if TYPE_CHECKING:
    pass

PICTURE_SIDE = 448  # pixels; frames are kept this large, for people to look at


def read_pictures(reader: FrameReader, indices: Sequence[int]) -> dict[int, np.ndarray]:
    """Small pictures of these frames, by index."""
    return {frame.number: small_picture(frame.image) for frame in reader.frames(lambda r: sorted(indices))}


def small_picture(image: np.ndarray) -> np.ndarray:
    """An image of at most 448 pixels a side, to be looked at by people."""
    from PIL import Image

    longest = max(image.shape[:2])
    if longest <= PICTURE_SIDE:
        return np.array(image)
    size = (
        max(1, round(image.shape[1] * PICTURE_SIDE / longest)),
        max(1, round(image.shape[0] * PICTURE_SIDE / longest)),
    )
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))
