"""Images, animations and folders of images, through Pillow. Sizes are checked in the header, before anything is decoded."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.container import check_size, reason

IMAGE_FORMATS = (
    "JPEG",
    "PNG",
    "GIF",
    "BMP",
    "PPM",
    "WEBP",
    "TIFF",
)  # none of which starts another program; FFmpeg opens more
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}

Picture = tuple[Callable[[], np.ndarray], float]  # loads RGB; shown for so many seconds


def open_picture(path: Path) -> Any:
    """A Pillow image if the file is one (told by its content), else None."""
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked instead, before anything is decoded
    try:
        picture = Image.open(path, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        return None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path} is a damaged image ({reason(error)})") from None
    check_size(*picture.size, str(path))
    return picture


def animation_pictures(picture: Any) -> list[Picture]:
    """The pictures of an opened image, one or an animation's."""
    from PIL import ImageOps

    count = getattr(picture, "n_frames", 1) if picture.format in ("GIF", "PNG", "WEBP", "AVIF") else 1

    def load(i: int) -> np.ndarray:
        try:
            if count > 1:
                picture.seek(i)
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise MediaError(f"{picture.filename} is a damaged image ({reason(error)})") from None

    def seconds(i: int) -> float:
        if count == 1:
            return 0.0
        with contextlib.suppress(OSError, ValueError, SyntaxError, EOFError):
            picture.seek(i)
            return float(picture.info.get("duration") or 100) / 1000
        return 0.1

    return [(lambda i=i: load(i), seconds(i)) for i in range(count)]  # type: ignore[misc]


def folder_pictures(folder: Path) -> list[Picture]:
    """A folder's images in natural order (frame2 before frame10), one second each."""
    names = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    if not names:
        raise MediaError(f"the folder {folder} holds no images")
    names.sort(
        key=lambda p: [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", p.name)]
    )

    def load(path: Path) -> np.ndarray:
        picture = open_picture(path)
        if picture is None:
            raise MediaError(f"{path} is not an image that can be read")
        with picture:
            return animation_pictures(picture)[0][0]()

    return [(lambda path=path: load(path), 1.0) for path in names]  # type: ignore[misc]
