"""Read images, animations and folders of images."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.commands import frame_number
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.vision.frame_choice import read_frames


def test_an_animated_gif(tmp_path: Path, moving_frames: np.ndarray) -> None:
    path = tmp_path / "moving.gif"
    pictures = [Image.fromarray(frame) for frame in moving_frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80, loop=0)
    found = read_frames(path, 6)
    assert found.kind == "video" and found.count == 24
    assert [frame_number(image) for image in found.images] == found.indices
    assert found.times == pytest.approx([0.08 * i for i in found.indices], abs=0.001)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_a_still_image(tmp_path: Path, moving_frames: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"still.{suffix}"
    Image.fromarray(moving_frames[5]).save(path, quality=95)
    found = read_frames(path, 8)
    assert found.kind == "image" and len(found.images) == 1 and frame_number(found.images[0]) == 5


def test_a_photo_is_rotated_upright(tmp_path: Path, moving_frames: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate clockwise to view
    Image.fromarray(moving_frames[0]).save(tmp_path / "photo.jpg", exif=exif)
    assert read_frames(tmp_path / "photo.jpg", 1).images[0].shape == (128, 96, 3)


def test_a_folder_of_images_in_natural_order(tmp_path: Path, moving_frames: np.ndarray) -> None:
    for i, frame in enumerate(moving_frames[:12]):
        Image.fromarray(frame).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    found = read_frames(tmp_path, 12)
    assert sorted({frame_number(image) for image in found.images}) == sorted(set(found.indices))
    assert [frame_number(image) for image in found.images] == found.indices
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="holds no images"):
        read_frames(tmp_path / "empty", 4)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _empty_png(width: int, height: int) -> bytes:
    """A PNG whose header states a size, and that holds no pixels."""
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = _png_chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + _png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (1, 1, "too small"),
        (16000, 16000, "too large"),
        (60000, 100, "too large"),
        (2**31 - 1, 2**31 - 1, "large|damaged"),
    ],
)
def test_sizes_are_checked_before_anything_is_allocated(
    tmp_path: Path, width: int, height: int, words: str
) -> None:
    (tmp_path / "odd.png").write_bytes(_empty_png(width, height))
    with pytest.raises(MediaError, match=words):
        read_frames(tmp_path / "odd.png", 4)
