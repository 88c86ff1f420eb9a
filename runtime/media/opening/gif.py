"""The pictures of a GIF file, found without decoding any: how long each is shown, and how far it reaches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from ppllava_edge.runtime.media.limits import Budget

IMAGE, EXTENSION, TRAILER = b",", b"!", b";"
COMMENT, GRAPHIC_CONTROL = 254, 249  # labels of extensions
COLOR_TABLE = 0x80  # flag: a colour table follows; the lowest 3 bits give its size


class GifPicture(NamedTuple):
    """One picture of an animation.

    Attributes:
        milliseconds: How long it is shown; 0 if the file doesn't say.
        right, bottom: The edges of its part of the canvas, in pixels. They may exceed the file's canvas.
    """

    milliseconds: int
    right: int
    bottom: int


def scan_gif(file: BinaryIO, budget: Budget) -> Iterator[GifPicture]:
    """Walk through a GIF's blocks, counting pictures as Pillow does. Stops where the file is cut off.

    Args:
        file: The file, at its beginning.
        budget: Its time is checked.
    """
    header = file.read(13)
    if len(header) == 13 and header[10] & COLOR_TABLE:
        file.read(3 << (header[10] & 7) + 1)
    milliseconds = 0
    while block := file.read(1):
        budget.check()
        if block == EXTENSION:
            label = file.read(1)
            data = _data(file)
            if label and label[0] == GRAPHIC_CONTROL and data is not None and len(data) >= 3:
                milliseconds = 10 * int.from_bytes(data[1:3], "little")
            if not (label and label[0] == COMMENT and data is None):
                _skip_data(file)
        elif block == IMAGE:
            place = file.read(9)
            if len(place) < 9:
                return
            left, top, width, height = (int.from_bytes(place[i : i + 2], "little") for i in (0, 2, 4, 6))
            yield GifPicture(milliseconds, left + width, top + height)
            milliseconds = 0
            if place[8] & COLOR_TABLE:
                file.read(3 << (place[8] & 7) + 1)
            file.read(1)  # bits per colour
            _skip_data(file)
        elif block == TRAILER:
            return


def _data(file: BinaryIO) -> bytes | None:
    """The next block of data; None at the end of a chain of blocks."""
    size = file.read(1)
    return file.read(size[0]) if size and size[0] else None


def _skip_data(file: BinaryIO) -> None:
    """Skip a chain of blocks."""
    while _data(file) is not None:
        pass
