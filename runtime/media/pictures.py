"""Images, animations and folders of images, through Pillow. Sizes are checked before any pixel is decoded.

Pillow's settings (MAX_IMAGE_PIXELS, LOAD_TRUNCATED_IMAGES) belong to the app's process: they are never
changed here.
"""

from __future__ import annotations

import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.container import reason
from ppllava_edge.runtime.media.limits import Budget, MemoryShortage, check_size
from ppllava_edge.runtime.media.opening.gif import scan_gif
from ppllava_edge.runtime.media.opening.paths import display_name, open_regular

# Pillow reads these by itself; for some others it starts another program.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}
MAX_FILE_BYTES = 2**29  # Pillow reads WebP files as a whole; larger files count as videos
DEFAULT_SECONDS = 0.1  # for an animation's frame without a duration
FOLDER_SECONDS = 1.0  # for each image of a folder


class Pictures(ABC):
    """Pictures that are decoded when they are needed. No file stays open between two calls.

    Attributes:
        seconds: How long each picture is shown.
    """

    seconds: Sequence[float]

    @abstractmethod
    def read(self, numbers: Sequence[int], budget: Budget) -> Iterator[tuple[int, np.ndarray]]:
        """Decode pictures.

        Args:
            numbers: Which, ascending.
            budget: What reading them may cost.

        Yields:
            A number and its picture, upright, RGB uint8 (H, W, 3).

        Raises:
            MediaError: If a picture can't be decoded or costs too much.
        """


class ImageFile(Pictures):
    """An image, or the pictures of an animation. See `recognised`."""

    def __init__(self, path: Path, seconds: Sequence[float]):
        self.path, self.seconds = path, seconds

    @classmethod
    def recognised(cls, path: Path, budget: Budget) -> ImageFile | None:
        """Open an image file. Files are recognised by content, not by name.

        Args:
            path: A regular file.
            budget: What reading it may cost.

        Returns:
            The pictures, none of them decoded yet; None if the file isn't an image.

        Raises:
            MediaError: If the image is damaged, too large or has too many pictures.
        """
        with open_picture(path, budget) as picture:
            if picture is None:
                return None
            if picture.format == "GIF":
                return cls(path, _gif_seconds(path, picture.size, budget))
            return cls(path, _seconds(picture, budget))

    def read(self, numbers: Sequence[int], budget: Budget) -> Iterator[tuple[int, np.ndarray]]:
        """See Pictures.read. A picture of an animation is drawn over those before it."""
        wanted = set(numbers)
        with open_picture(self.path, budget) as picture:
            if picture is None:
                raise MediaError(f"{budget.what} is no longer an image")
            for number in range(max(wanted) + 1):
                with _damage_reported(budget.what):
                    if len(self.seconds) > 1:
                        picture.seek(number)  # one by one: a GIF's canvas can grow at any picture
                budget.add(*picture.size)
                if number in wanted:
                    yield number, _upright(picture, budget.what)


class ImageFolder(Pictures):
    """The images of a folder in natural order (frame2 before frame10), one second each.

    Args:
        folder: The folder.
        budget: Its limits are max_files and decode_seconds.

    Raises:
        MediaError: If there are no images, too many, or the folder can't be read.
    """

    def __init__(self, folder: Path, budget: Budget):
        names = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    budget.check()
                    suffix = os.path.splitext(entry.name)[1].lower()
                    if suffix in IMAGE_SUFFIXES and entry.is_file():
                        names.append(entry.name)
                    if len(names) > budget.limits.max_files:
                        raise MediaError(
                            f"{budget.what} holds more than {budget.limits.max_files} images; "
                            "raise the limit max_files"
                        )
        except OSError as error:
            raise MediaError(f"{budget.what} can't be read ({error.strerror or error})") from None
        if not names:
            raise MediaError(
                f"{budget.what} holds no images; videos in a folder are asked one by one (batch)"
            )
        self.paths = [folder / name for name in sorted(names, key=natural_order)]
        self.seconds = [FOLDER_SECONDS] * len(names)

    def read(self, numbers: Sequence[int], budget: Budget) -> Iterator[tuple[int, np.ndarray]]:
        """See Pictures.read. Of an animation, the first picture is taken."""
        for number in numbers:
            path = self.paths[number]
            name = display_name(path)
            with open_picture(path, budget, name) as picture:
                if picture is None:
                    raise MediaError(f"{name} is not an image that can be read")
                budget.add(*picture.size)
                yield number, _upright(picture, name)


@contextlib.contextmanager
def open_picture(path: Path, budget: Budget, name: str | None = None) -> Iterator[Any]:
    """Open an image file by its content.

    Args:
        path: A regular file.
        budget: Its limits on a picture's size are checked.
        name: The file's name, for messages; None: the budget's.

    Yields:
        A Pillow image whose pixels aren't decoded yet; None if the file isn't an image.

    Raises:
        MediaError: If the image is damaged or has an unusable size.
    """
    from PIL import Image, UnidentifiedImageError

    name = name or budget.what
    with open_regular(path) as file:
        picture = None
        if os.fstat(file.fileno()).st_size <= MAX_FILE_BYTES:
            with contextlib.suppress(UnidentifiedImageError), _damage_reported(name):
                picture = Image.open(file, formats=IMAGE_FORMATS)
                check_size(*picture.size, name, budget.limits)
        try:
            yield picture
        finally:
            if picture is not None:
                picture.close()


@contextlib.contextmanager
def _damage_reported(name: str) -> Iterator[None]:
    """Raise Pillow's errors as MediaError.

    All of them: damaged files raise KeyError, IndexError, struct.error, ZeroDivisionError and others there.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (MediaError, UnidentifiedImageError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"{name}: its pictures are too large ({reason(error)})") from None
    except MemoryError:
        raise MemoryShortage(name) from None
    except Exception as error:
        raise MediaError(f"{name} is a damaged image ({reason(error)})") from None


def _upright(picture: Any, name: str) -> np.ndarray:
    """Decode the picture that is due, rotated as its EXIF data asks, to RGB uint8 (H, W, 3)."""
    from PIL import ImageOps

    with _damage_reported(name):
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def _gif_seconds(path: Path, size: tuple[int, int], budget: Budget) -> list[float]:
    """How long each picture of a GIF with a canvas of this size is shown. Nothing is decoded."""
    seconds: list[float] = []
    width, height = size
    with open_regular(path) as file:
        for picture in scan_gif(file, budget):
            width, height = max(width, picture.right), max(height, picture.bottom)
            seconds.append(picture.milliseconds / 1000 or DEFAULT_SECONDS)
            _check_animation(len(seconds), width, height, budget)
    return seconds if len(seconds) > 1 else [0.0]


def _seconds(picture: Any, budget: Budget) -> list[float]:
    """How long each picture of an image or animation is shown; those after damage are left out."""
    with _damage_reported(budget.what):
        count = int(getattr(picture, "n_frames", 1)) if picture.format in ANIMATED_FORMATS else 1
    if count <= 1:
        return [0.0]
    _check_animation(count, picture.size[0], picture.size[1], budget)
    seconds: list[float] = []
    with contextlib.suppress(MediaError):
        for number in range(count):
            budget.check()
            with _damage_reported(budget.what):
                picture.seek(number)
                if picture.format == "WEBP":
                    picture.load()  # its durations are known once a picture is decoded
                duration = float(picture.info.get("duration") or 0) / 1000
            seconds.append(duration if 0 < duration < 1e6 else DEFAULT_SECONDS)
    budget.check()
    return seconds if len(seconds) > 1 else [0.0]


def _check_animation(count: int, width: int, height: int, budget: Budget) -> None:
    """Refuse animations with too many pictures, or too many pixels in all."""
    limits = budget.limits
    check_size(max(width, 8), max(height, 8), budget.what, limits)
    if count > limits.max_files:
        raise MediaError(
            f"{budget.what} has more than {limits.max_files} pictures; raise the limit max_files"
        )
    if count * width * height > limits.max_animation_pixels:
        raise MediaError(
            f"{budget.what}: {count} or more pictures of {width}x{height} pixels are too large an animation; "
            "make it a video, or raise the limit max_animation_pixels"
        )


def natural_order(name: str) -> list[int | str]:
    """Sort key: numbers in a name count as numbers."""
    parts = re.split(r"(\d+)", name)  # every second part is a number
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(parts)]
