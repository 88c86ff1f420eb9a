"""From RGB frames to what the vision tower sees, exactly as upstream's image processors do it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ppllava_edge.engines.bundle.manifest import Preprocessing
from ppllava_edge.runtime.vision.anyres import best_resolution


def preprocess_video(images: Sequence[np.ndarray], p: Preprocessing) -> np.ndarray:
    """RGB uint8 images (H,W,3) → pixels (T,3,size,size) float32.

    "squash" resizes without keeping the aspect (CLIP); "pad" fits the frame into the square, centred on black (SigLIP).
    """
    pictures = (Image.fromarray(image) for image in images)
    fitted = (picture if p.method == "squash" else _fit(picture, p.size, p.size) for picture in pictures)
    return np.stack([_normalise(_resize(picture, p.size, p.size), p) for picture in fitted])


def preprocess_image(image: np.ndarray, p: Preprocessing) -> np.ndarray:
    """One RGB uint8 image (H,W,3) → tiles (1+n,3,size,size) float32: the whole image squashed, then crops row by row (any resolution).

    Without image_grids there is only the whole image.
    """
    side = p.size
    picture = Image.fromarray(image)
    tiles = [_resize(picture, side, side)]
    if p.image_grids:
        height, width = best_resolution(image.shape[:2], p.image_grids)
        canvas = _fit(picture, width, height)
        for top in range(0, canvas.height, side):
            for left in range(0, canvas.width, side):
                crop = canvas.crop(
                    (left, top, min(left + side, canvas.width), min(top + side, canvas.height))
                )
                tiles.append(_fill(crop, side) if p.method == "squash" else _resize(crop, side, side))
    return np.stack([_normalise(tile, p) for tile in tiles])


def _resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scale to fit (aspect kept, the other side rounded up) and centre on black.

    As upstream, an odd margin loses a pixel: the result can be one short of the size asked for, and is stretched to it afterwards.
    """
    w, h = picture.size
    if width / w < height / h:
        new_w, new_h = width, min(math.ceil(h * (width / w)), height)
    else:
        new_w, new_h = min(math.ceil(w * (height / h)), width), height
    left, top = (width - new_w) // 2, (height - new_h) // 2
    canvas = Image.new("RGB", (new_w + 2 * left, new_h + 2 * top))
    canvas.paste(_resize(picture, new_w, new_h), (left, top))
    return canvas


def _fill(picture: Image.Image, side: int) -> Image.Image:
    """CLIP's processor: the shorter side becomes `side`, then the centre is cropped."""
    w, h = picture.size
    short, long = min(w, h), max(w, h)
    new_long = int(side * long / short)
    scaled = _resize(picture, side if w <= h else new_long, new_long if w <= h else side)
    left, top = (scaled.width - side) // 2, (scaled.height - side) // 2
    return scaled.crop((left, top, left + side, top + side))


def _normalise(picture: Image.Image, p: Preprocessing) -> np.ndarray:
    """RGB picture → float32 (3,H,W): times 1/255, minus mean, over std."""
    scaled = np.asarray(picture).astype(np.float32) * np.float32(1 / 255)
    return ((scaled - np.array(p.mean, np.float32)) / np.array(p.std, np.float32)).transpose(2, 0, 1)
