"""Targets that read videos, images and animations."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np

from ppllava_edge.bench.fuzz.targets.target import LIMITS, Target, expect
from ppllava_edge.runtime.live.source import LiveSource
from ppllava_edge.runtime.media.isolation import open_source
from ppllava_edge.runtime.media.readers import FrameReader
from ppllava_edge.runtime.media.thumbnails import read_pictures
from ppllava_edge.runtime.vision.frame_choice import choose_frames

FRAMES = 6
LIVE_FRAMES = 200  # after which a live view is closed


def read_media(path: Path, scratch: Path) -> None:
    """Open a file, read some frames, and read two of them again as small pictures."""
    _read_all(open_source(path, LIMITS))


def read_isolated(path: Path, scratch: Path) -> None:
    """The same with decoding in a process of its own."""
    _read_all(open_source(path, LIMITS, isolate=True))


def _read_all(reader: FrameReader) -> None:
    _check_facts(reader)
    numbers = []
    for frame in reader.frames(lambda r: choose_frames(r, FRAMES)):
        _check_image(frame.image)
        expect(math.isfinite(frame.seconds), "time: of a frame isn't finite")
        numbers.append(frame.number)
    expect(numbers, "frames: none, and no error")
    expect(set(reader.indices) <= set(numbers), "frames: a chosen one is missing")
    _check_facts(reader)
    for picture in read_pictures(reader, numbers[:2]).values():
        _check_image(picture)


def read_range(path: Path, scratch: Path) -> None:
    """Read a few frames between two times: by seeking, if the file is long enough."""
    reader = open_source(path, LIMITS)
    for frame in reader.frames(lambda r: choose_frames(r, 2, 0.7 * r.duration, 0.8 * r.duration)):
        _check_image(frame.image)


def read_playlist(path: Path, scratch: Path) -> None:
    """Open a text that names other files and addresses: none of them may be opened."""
    canaries = scratch.parent / "canaries"
    port = (scratch.parent / "port").read_bytes()
    text = path.read_bytes().replace(b"@FOLDER@", bytes(canaries)).replace(b"@PORT@", port)
    copy = scratch / f"video{path.suffix}"
    copy.write_bytes(text)
    read_media(copy, scratch)


def play_live(path: Path, scratch: Path) -> None:
    """Play a file as a live view does, without its pauses."""
    closed = threading.Event()
    frames = 0

    def count() -> None:
        nonlocal frames
        frames += 1
        if frames >= LIVE_FRAMES:
            closed.set()

    def deliver(image: np.ndarray, seconds: float) -> None:
        _check_image(image)
        expect(math.isfinite(seconds), "time: of a live frame isn't finite")

    source = LiveSource(path, lambda seconds: True, deliver, realtime=False, timeout=5.0, limits=LIMITS)
    source.read(closed, count)


def _check_facts(reader: FrameReader) -> None:
    expect(reader.count >= 1, "count: below 1")
    expect(math.isfinite(reader.fps) and reader.fps > 0, "fps: not a number above 0")
    expect(math.isfinite(reader.duration) and reader.duration >= 0, "duration: not a number")
    expect(all("\n" not in note for note in reader.notes), "note: of several lines")


def _check_image(image: np.ndarray) -> None:
    shape_fits = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    expect(shape_fits, "image: not RGB uint8")
    expect(image.shape[0] * image.shape[1] <= LIMITS.max_frame_pixels, "image: larger than the limit")


def _file(name: str, suffix: str, grammar: str, weight: float = 1.0) -> Target:
    return Target(name, read_media, suffix, grammar, weight)


MEDIA_TARGETS: tuple[Target, ...] = (
    _file("mp4", ".mp4", "boxes", 4),
    _file("mkv", ".mkv", "ebml", 2),
    _file("avi", ".avi", "riff"),
    _file("ts", ".ts", "ts"),
    _file("video", ".bin", ""),
    _file("gif", ".gif", "gif", 2),
    _file("png", ".png", "png", 2),
    _file("jpeg", ".jpg", "jpeg", 1.5),
    _file("webp", ".webp", "riff", 1.5),
    _file("tiff", ".tiff", "tiff"),
    _file("bmp", ".bmp", "", 0.5),
    _file("ppm", ".ppm", "text", 0.5),
    Target("range", read_range, ".mp4", "boxes"),
    Target("playlist", read_playlist, ".mp4", "text"),
    Target("live", play_live, ".mp4", "boxes", 0.5),
    Target("isolated", read_isolated, ".mp4", "boxes", 0.03),
)
