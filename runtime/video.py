"""Decoding: any container and codec that FFmpeg opens, images, animations, and folders of images.

Only the sampled frames are converted to RGB. Sizes are checked before anything large is allocated. Damaged files give the frames that can
be decoded, and a note that says so.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.errors import MediaError
from .frames import WHOLE, check_range, sample_indices

SMALLEST_SIDE, LARGEST_SIDE, LARGEST_AREA = 8, 16384, 8192 * 8192  # pixels
MOST_FRAMES = 4096  # that can be sampled at once
MOST_ERRORS = 1000  # packets that may fail before a file is given up
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")  # none of which starts another program; FFmpeg opens more
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}


@dataclass
class Frames:
    """Sampled frames. images: RGB uint8 (H,W,3) each. indices: which frames of the video. times: seconds. count: frames in the video.

    kind: "video" or "image". notes: what people should know (a truncated file, say).
    """

    images: list[np.ndarray]
    indices: list[int]
    times: list[float]
    count: int
    fps: float
    duration: float
    kind: str = "video"
    notes: list[str] = field(default_factory=list)


def read_frames(
    source: str | os.PathLike[str],
    frames: int,
    start: float | None = None,
    end: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Frames:
    """Sample `frames` frames between start and end (seconds) from a video file, an image, an animation or a folder of images.

    progress: called with (frames seen, frames to go through). Raises MediaError in one line for anything unusable.
    """
    if not 1 <= frames <= MOST_FRAMES:
        raise MediaError(f"--frames must be from 1 to {MOST_FRAMES}, not {frames}")
    for name, value in (("--start", start), ("--end", end)):
        if value is not None and not (0 <= value < 1e9):
            raise MediaError(f"{name} must be 0 or more seconds, not {value:g}")
    path = Path(source)
    if path.is_dir():
        return _read_pictures(_folder_pictures(path), f"the folder {path}", frames, start, end)
    if not path.exists():
        raise MediaError(f"no such file: {source}")
    if not path.is_file():
        raise MediaError(f"{source} is not a regular file")
    if path.stat().st_size == 0:
        raise MediaError(f"{source} is empty (0 bytes)")
    picture = _open_picture(path)
    if picture is not None:
        with picture:
            return _read_pictures(_animation_pictures(picture), str(path), frames, start, end)
    return _read_video(path, frames, start, end, progress)


# -- video files -----------------------------------------------------------------------------------------------------


@dataclass
class _Index:
    """What reading the packets (not decoding them) tells: frames in the file and how many it promised, their rate, the first one's time,
    whether reading ended early or in an error."""

    count: int
    promised: int
    fps: float
    start: float
    broken: bool


def _read_video(path: Path, frames: int, start: float | None, end: float | None, progress: Callable[[int, int], None] | None) -> Frames:
    index = _index_packets(path)
    bound = _bound(start, end)
    check_range(index.count, index.fps, bound, str(path))
    indices = sample_indices(index.count, index.fps, frames, bound)
    found, decoded, damaged = _decode(path, set(indices), index, progress)
    notes = []
    missing = [i for i in indices if i not in found]
    if missing:  # fewer frames came out than packets went in: choose again among those that did
        if decoded == 0:
            raise MediaError(f"no frame of {path} could be decoded; the file is damaged")
        check_range(decoded, index.fps, bound, str(path))
        indices = sample_indices(decoded, index.fps, frames, bound)
        found, _, damaged = _decode(path, set(indices), index, None)
        indices = [i for i in indices if i in found]
        if not indices:
            raise MediaError(f"no frame of {path} could be decoded; the file is damaged")
    count = decoded if missing else index.count
    if count < index.promised:
        notes.append(f"{path.name} is truncated or damaged: answering from the {count} of {index.promised} frames that could be decoded")
    elif damaged or index.broken:
        notes.append(f"{path.name} is damaged: some of its frames may not show what they should")
    images, times = [found[i][0] for i in indices], [found[i][1] for i in indices]
    return Frames(images, indices, times, count, index.fps, count / index.fps, notes=notes)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream. FFmpeg's errors become MediaErrors.

    PyAV's log level is left alone: any level but its default makes decoding threads wait for the interpreter when they have something to say,
    and freeing a decoder, which waits for its threads, then hangs now and then.
    """
    import av

    try:
        container = av.open(str(path), metadata_errors="replace")
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(f"{path} is not a video that can be read ({_reason(error)})") from None
    with container:
        streams = [s for s in container.streams.video if not _is_cover(s)]
        if not streams:
            what = "only sound" if container.streams.audio else "no video"
            raise MediaError(f"{path} holds {what}; a video stream is needed")
        stream = streams[0]
        if stream.codec_context is None:
            raise MediaError(f"{path} uses a video codec that this FFmpeg doesn't know")
        check_size(stream.codec_context.width, stream.codec_context.height, str(path), unknown_allowed=True)
        stream.thread_type = "AUTO"
        yield container, stream


def _is_cover(stream: Any) -> bool:
    """Album art is a video stream of one picture."""
    return bool(int(stream.disposition) & 0x400)


def _index_packets(path: Path) -> _Index:
    import av

    count, broken, last, first = 0, False, None, None
    with _opened(path) as (container, stream):
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    count += 1
                    if packet.pts is not None:
                        first = packet.pts if first is None else min(first, packet.pts)
                        last = packet.pts if last is None else max(last, packet.pts)
                    broken = broken or packet.is_corrupt
        except av.error.FFmpegError:
            broken = True
        fps = float(stream.average_rate or 0)
        if not 0.001 < fps < 100000:
            span = float((last - first) * stream.time_base) if first is not None and last is not None and last > first else 0.0
            fps = (count - 1) / span if span else 25.0
        origin = float(first * stream.time_base) if first is not None else 0.0
        promised = int(stream.frames or 0)
        broken = broken or count < promised
    if count == 0:
        raise MediaError(f"{path} has a video stream without a single frame")
    return _Index(count, max(count, promised), fps, origin, broken)


def _decode(
    path: Path, wanted: set[int], index: _Index, progress: Callable[[int, int], None] | None
) -> tuple[dict[int, tuple[np.ndarray, float]], int, bool]:
    """Decode up to the last wanted frame. Returns {index: (RGB, seconds)}, how many frames came out, and whether any was damaged."""
    import av

    found: dict[int, tuple[np.ndarray, float]] = {}
    at, last, damaged, errors = 0, max(wanted), False, 0
    with _opened(path) as (container, stream):
        packets = container.demux(stream)
        while at <= last:
            try:
                packet = next(packets, None)
                decoded = packet.decode() if packet is not None else []
            except av.error.FFmpegError:
                damaged, errors = True, errors + 1
                if errors > MOST_ERRORS:
                    break
                continue
            if packet is None:
                break
            for frame in decoded:
                damaged = damaged or bool(getattr(frame, "is_corrupt", False))
                if at in wanted:
                    check_size(frame.width, frame.height, str(path))
                    seconds = float(frame.pts * frame.time_base) - index.start if frame.pts is not None and frame.time_base else at / index.fps
                    found[at] = (_upright(frame), max(seconds, 0.0))
                at += 1
            if progress:
                progress(min(at, last + 1), last + 1)
    return found, at, damaged


def _upright(frame: Any) -> np.ndarray:
    """A frame as RGB uint8 (H,W,3), turned as its rotation metadata asks (counter-clockwise degrees)."""
    image = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def check_size(width: int, height: int, what: str, unknown_allowed: bool = False) -> None:
    """Refuse frames that are too small to show anything or too large to allocate. Raises MediaError."""
    if unknown_allowed and not (width and height):
        return
    if min(width, height) < SMALLEST_SIDE:
        raise MediaError(f"{what}: frames of {width}x{height} pixels are too small; {SMALLEST_SIDE}x{SMALLEST_SIDE} is the least")
    if max(width, height) > LARGEST_SIDE or width * height > LARGEST_AREA:
        raise MediaError(f"{what}: frames of {width}x{height} pixels are too large; scale the video down below {LARGEST_AREA // 10**6} megapixels")


def _bound(start: float | None, end: float | None) -> tuple[float, float] | None:
    """The range in seconds, None for all."""
    if start is None and end is None:
        return None
    return start or 0.0, WHOLE[1] if end is None else end


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0][:120] if text else type(error).__name__


# -- images, animations, folders -------------------------------------------------------------------------------------

Picture = tuple[Callable[[], np.ndarray], float]  # loads RGB; shown for so many seconds


def _open_picture(path: Path) -> Any:
    """A Pillow image if the file is one (told by its content), else None."""
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked instead, before anything is decoded
    try:
        picture = Image.open(path, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        return None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path} is a damaged image ({_reason(error)})") from None
    check_size(*picture.size, str(path))
    return picture


def _animation_pictures(picture: Any) -> list[Picture]:
    from PIL import ImageOps

    count = getattr(picture, "n_frames", 1) if picture.format in ("GIF", "PNG", "WEBP", "AVIF") else 1

    def load(i: int) -> np.ndarray:
        try:
            if count > 1:
                picture.seek(i)
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise MediaError(f"{picture.filename} is a damaged image ({_reason(error)})") from None

    def seconds(i: int) -> float:
        if count == 1:
            return 0.0
        with contextlib.suppress(OSError, ValueError, SyntaxError, EOFError):
            picture.seek(i)
            return float(picture.info.get("duration") or 100) / 1000
        return 0.1

    return [(lambda i=i: load(i), seconds(i)) for i in range(count)]  # type: ignore[misc]


def _folder_pictures(folder: Path) -> list[Picture]:
    """A folder's images in natural order (frame2 before frame10), one second each."""
    names = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    if not names:
        raise MediaError(f"the folder {folder} holds no images")
    names.sort(key=lambda p: [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", p.name)])

    def load(path: Path) -> np.ndarray:
        picture = _open_picture(path)
        if picture is None:
            raise MediaError(f"{path} is not an image that can be read")
        with picture:
            return _animation_pictures(picture)[0][0]()

    return [(lambda path=path: load(path), 1.0) for path in names]  # type: ignore[misc]


def _read_pictures(pictures: Sequence[Picture], what: str, frames: int, start: float | None, end: float | None) -> Frames:
    if len(pictures) == 1:
        return Frames([pictures[0][0]()], [0], [0.0], 1, 1.0, 0.0, kind="image")
    starts = np.concatenate([[0.0], np.cumsum([seconds for _, seconds in pictures])])
    duration = float(starts[-1])
    fps = len(pictures) / duration
    bound = _bound(start, end)
    check_range(len(pictures), fps, bound, what)
    indices = sample_indices(len(pictures), fps, frames, bound)
    loaded = {i: pictures[i][0]() for i in sorted(set(indices))}
    return Frames([loaded[i] for i in indices], indices, [float(starts[i]) for i in indices], len(pictures), fps, duration)
