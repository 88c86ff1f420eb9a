"""Fit an image into a rectangle with its aspect kept, as upstream's image processors do.

Shared by the kernels of this folder and by runtime/vision/preprocess.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Letterbox(NamedTuple):
    """Position of a resized image on its canvas, in pixels.

    Attributes:
        height: Height of the resized image.
        width: Width of the resized image.
        top: Margin above the image, and below.
        left: Margin on the left, and on the right.
    """

    height: int
    width: int
    top: int
    left: int

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the canvas; one less than the target where a margin would be odd."""
        return self.height + 2 * self.top, self.width + 2 * self.left


def letterbox(height: int, width: int, target_height: int, target_width: int) -> Letterbox:
    """Scale an image to fit, its other side rounded up, and centre it.

    As upstream, both margins are equal: with an odd difference the canvas is one pixel short of the target,
    and has to be stretched afterwards.
    """
    if target_width / width < target_height / height:
        new_width = target_width
        new_height = min(math.ceil(height * (target_width / width)), target_height)
    else:
        new_width = min(math.ceil(width * (target_height / height)), target_width)
        new_height = target_height
    return Letterbox(
        new_height, new_width, (target_height - new_height) // 2, (target_width - new_width) // 2
    )
