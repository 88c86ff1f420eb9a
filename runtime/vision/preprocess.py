"""Preprocess RGB frames for the vision tower, exactly as upstream's image processors do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ppllava_edge.engines.bundle.manifest import Preprocessing
from ppllava_edge.engines.plugins.prepare_frame.letterbox import letterbox
from ppllava_edge.runtime.vision.anyres import best_resolution


def preprocess_video(images: Sequence[np.ndarray], p: Preprocessing) -> np.ndarray:
    """Resize and normalise the frames of a video.

    Args:
        images: RGB uint8 (H, W, 3) each.
        p: "squash" resizes without keeping the aspect (CLIP); "pad" fits the frame into the square, centred
            on black (SigLIP).

    Returns:
        Pixels (T, 3, size, size) float32.
    """
    pictures = (Image.fromarray(image) for image in images)
    fitted = (picture if p.method == "squash" else _fit(picture, p.size, p.size) for picture in pictures)
    return np.stack([_normalise(_resize(picture, p.size, p.size), p) for picture in fitted])


def preprocess_image(image: np.ndarray, p: Preprocessing) -> np.ndarray:
    """Cut a single image into tiles (any resolution), resize and normalise them.

    Args:
        image: RGB uint8 (H, W, 3).
        p: Without image_grids there are no crops.

    Returns:
        Tiles (1+n, 3, size, size) float32: the whole image squashed, then n crops row by row.
    """
    picture = Image.fromarray(image)
    tiles = [_resize(picture, p.size, p.size), *_crops(picture, p)]
    return np.stack([_normalise(tile, p) for tile in tiles])


def count_tiles(size: tuple[int, int], p: Preprocessing) -> int:
    """How many tiles `preprocess_image` makes of an image of this height and width."""
    if not p.image_grids:
        return 1
    height, width = best_resolution(size, p.image_grids)
    return 1 + (height // p.size) * (width // p.size)


def _crops(picture: Image.Image, p: Preprocessing) -> list[Image.Image]:
    """The crops of the best grid, (size, size) each."""
    if not p.image_grids:
        return []
    side = p.size
    height, width = best_resolution((picture.height, picture.width), p.image_grids)
    canvas = _fit(picture, width, height)
    crops = []
    for top in range(0, canvas.height, side):
        for left in range(0, canvas.width, side):
            right, bottom = min(left + side, canvas.width), min(top + side, canvas.height)
            crop = canvas.crop((left, top, right, bottom))
            crops.append(_fill(crop, side) if p.method == "squash" else _resize(crop, side, side))
    return crops


def _resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scale to fit, centred on black; the result can be one pixel short of the target (see letterbox)."""
    fitted = letterbox(picture.height, picture.width, height, width)
    canvas_height, canvas_width = fitted.canvas
    canvas = Image.new("RGB", (canvas_width, canvas_height))
    canvas.paste(_resize(picture, fitted.width, fitted.height), (fitted.left, fitted.top))
    return canvas


def _fill(picture: Image.Image, side: int) -> Image.Image:
    """Scale the shorter side to `side`, then crop the centre (CLIP's processor)."""
    width, height = picture.size
    longer = int(side * max(width, height) / min(width, height))
    scaled = _resize(picture, side, longer) if width <= height else _resize(picture, longer, side)
    left, top = (scaled.width - side) // 2, (scaled.height - side) // 2
    return scaled.crop((left, top, left + side, top + side))


def _normalise(picture: Image.Image, p: Preprocessing) -> np.ndarray:
    """Convert an RGB picture to (3, H, W) float32: scaled to 0…1, then normalised by mean and deviation."""
    scaled = np.asarray(picture).astype(np.float32) * np.float32(1 / 255)
    return ((scaled - np.array(p.mean, np.float32)) / np.array(p.std, np.float32)).transpose(2, 0, 1)
