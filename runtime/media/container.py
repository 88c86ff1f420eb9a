"""Opening video files with FFmpeg: its errors become one clear line, sizes are checked before anything large is allocated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError

SMALLEST_SIDE, LARGEST_SIDE, LARGEST_AREA = 8, 16384, 8192 * 8192  # pixels
FALLBACK_FPS = 25.0  # of files that don't say


@contextlib.contextmanager
def open_container(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream. FFmpeg's errors become MediaErrors.

    PyAV's log level is left alone: any level but its default makes decoding threads wait for the interpreter when they have something to say,
    and freeing a decoder, which waits for its threads, then hangs now and then.
    """
    import av

    try:
        container = av.open(str(path), metadata_errors="replace")
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(f"{path} is not a video that can be read ({reason(error)})") from None
    with container:
        yield container, video_stream(container, str(path))


def video_stream(container: Any, what: str) -> Any:
    """The container's first video stream, ready to decode in threads. Raises MediaError if there is none that can be decoded."""
    streams = [s for s in container.streams.video if not _is_cover(s)]
    if not streams:
        holds = "only sound" if container.streams.audio else "no video"
        raise MediaError(f"{what} holds {holds}; a video stream is needed")
    stream = streams[0]
    if stream.codec_context is None:
        raise MediaError(f"{what} uses a video codec that this FFmpeg doesn't know")
    check_size(stream.codec_context.width, stream.codec_context.height, what, unknown_allowed=True)
    stream.thread_type = "AUTO"
    return stream


def _is_cover(stream: Any) -> bool:
    """Album art is a video stream of one picture."""
    return bool(int(stream.disposition) & 0x400)


def apply_rotation(frame: Any) -> np.ndarray:
    """A decoded frame as RGB uint8 (H,W,3), turned as its rotation metadata asks (counter-clockwise degrees)."""
    image: np.ndarray = frame.to_ndarray(format="rgb24")
    engine_lock = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, engine_lock)) if engine_lock else image


def check_size(width: int, height: int, what: str, unknown_allowed: bool = False) -> None:
    """Refuse frames that are too small to show anything or too large to allocate. Raises MediaError."""
    if unknown_allowed and not (width and height):
        return
    if min(width, height) < SMALLEST_SIDE:
        raise MediaError(
            f"{what}: frames of {width}x{height} pixels are too small; {SMALLEST_SIDE}x{SMALLEST_SIDE} is the least"
        )
    if max(width, height) > LARGEST_SIDE or width * height > LARGEST_AREA:
        raise MediaError(
            f"{what}: frames of {width}x{height} pixels are too large; scale the video down below {LARGEST_AREA // 10**6} megapixels"
        )


def reason(error: Exception) -> str:
    """Why FFmpeg or Pillow refused, in a few words."""
    text = getattr(error, "strerror", None) or str(error)
    return str(text).splitlines()[0][:120] if text else type(error).__name__
