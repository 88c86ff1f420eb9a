"""Images, animations and folders of images, through Pillow. Sizes are checked before any pixel is decoded."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.container import reason
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, MediaLimits, check_size

# Pillow reads these by itself; for some others it starts another program. FFmpeg opens further formats.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}
DEFAULT_SECONDS = 0.1  # for an animation's frame without a duration
FOLDER_SECONDS = 1.0  # for each image of a folder


class Picture(NamedTuple):
    """An image that is decoded when it is needed.

    Attributes:
        load: Decodes it, upright, to RGB uint8 (H, W, 3).
        seconds: How long it is shown.
    """

    load: Callable[[], np.ndarray]
    seconds: float


def open_picture(path: Path, limits: MediaLimits = DEFAULT_LIMITS) -> Any:
    """Open an image file. Files are recognised by content, not by name.

    Returns:
        A Pillow image whose pixels aren't decoded yet; None if the file isn't an image.

    Raises:
        MediaError: If the image is damaged or has an unusable size.
    """
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # check_size below replaces Pillow's own limit
    try:
        picture = Image.open(path, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        return None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path} is a damaged image ({reason(error)})") from None
    check_size(*picture.size, str(path), limits)
    return picture


def animation_pictures(picture: Any) -> list[Picture]:
    """List the pictures of an opened Pillow image: one, or all of an animation."""
    count = getattr(picture, "n_frames", 1) if picture.format in ANIMATED_FORMATS else 1
    if count == 1:
        return [Picture(partial(_load, picture, None), 0.0)]
    return [Picture(partial(_load, picture, i), _duration(picture, i)) for i in range(count)]


def _load(picture: Any, number: int | None) -> np.ndarray:
    """Decode picture `number` of an animation, or a still image (None)."""
    from PIL import ImageOps

    try:
        if number is not None:
            picture.seek(number)
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise MediaError(f"{picture.filename} is a damaged image ({reason(error)})") from None


def _duration(picture: Any, number: int) -> float:
    """Seconds that a picture of an animation is shown; the default for damaged ones."""
    with contextlib.suppress(OSError, ValueError, SyntaxError, EOFError):
        picture.seek(number)
        return float(picture.info.get("duration") or 1000 * DEFAULT_SECONDS) / 1000
    return DEFAULT_SECONDS


def folder_pictures(folder: Path, limits: MediaLimits = DEFAULT_LIMITS) -> list[Picture]:
    """List a folder's images in natural order (frame2 before frame10), one second each.

    Raises:
        MediaError: If there are none.
    """
    paths = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    if not paths:
        raise MediaError(f"the folder {folder} holds no images; for a folder of videos: --batch")
    paths.sort(key=_natural_order)
    return [Picture(partial(_load_file, path, limits), FOLDER_SECONDS) for path in paths]


def _natural_order(path: Path) -> list[int | str]:
    """Sort key: numbers in a name count as numbers."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", path.name)]


def _load_file(path: Path, limits: MediaLimits) -> np.ndarray:
    """Decode the first picture of an image file."""
    picture = open_picture(path, limits)
    if picture is None:
        raise MediaError(f"{path} is not an image that can be read")
    with picture:
        return animation_pictures(picture)[0].load()
