"""Open video files with FFmpeg: one-line errors, sizes checked before anything large is allocated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, MediaLimits, check_size

FALLBACK_FPS = 25.0  # for files with neither a frame rate nor timestamps
COVER_ART = 0x400  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC


@contextlib.contextmanager
def open_container(path: Path, limits: MediaLimits = DEFAULT_LIMITS) -> Iterator[tuple[Any, Any]]:
    """Open a video file.

    PyAV's log level stays at its default. Any other level makes decoding threads take the GIL to log a
    message; freeing a decoder waits for its threads, so it would sometimes deadlock.

    Args:
        path: The file.
        limits: What the file may cost.

    Yields:
        The PyAV container and its video stream, see `video_stream`.

    Raises:
        MediaError: If FFmpeg can't open the file, or it has no usable video stream.
    """
    import av

    try:
        container = av.open(str(path), metadata_errors="replace")
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(f"{path} is not a video that can be read ({reason(error)})") from None
    with container:
        yield container, video_stream(container, str(path), limits)


def video_stream(container: Any, what: str, limits: MediaLimits = DEFAULT_LIMITS) -> Any:
    """Return the container's first video stream, set up for multithreaded decoding.

    Args:
        container: An open PyAV container.
        what: The file or address, for error messages.
        limits: What the file may cost.

    Raises:
        MediaError: If there is no video stream, its codec is unknown or its frames have an unusable size.
    """
    streams = [s for s in container.streams.video if not _is_cover_art(s)]
    if not streams:
        holds = "only sound" if container.streams.audio else "no video"
        raise MediaError(f"{what} holds {holds}; a video stream is needed")
    stream = streams[0]
    if stream.codec_context is None:
        raise MediaError(f"{what} uses a video codec that this FFmpeg doesn't know")
    check_size(stream.codec_context.width, stream.codec_context.height, what, limits, True)
    stream.thread_type = "AUTO"
    return stream


def read_packets(container: Any, stream: Any) -> Iterator[Any]:
    """Yield a stream's packets, compressed frames in decoding order; empty ones mark the end.

    PyAV raises IndexError where a new stream begins in the middle of a file (joined transport streams,
    damaged ones). It is raised as FFmpeg's error for invalid data.
    """
    import av

    try:
        yield from container.demux(stream)
    except IndexError:
        raise av.error.InvalidDataError(-1, "a stream begins in the middle of the file") from None


def _is_cover_art(stream: Any) -> bool:
    """Whether a video stream is album art: a single picture attached to a sound file."""
    return bool(int(stream.disposition) & COVER_ART)


def apply_rotation(frame: Any) -> np.ndarray:
    """Convert a decoded frame to RGB uint8 (H, W, 3), rotated as its metadata asks."""
    image: np.ndarray = frame.to_ndarray(format="rgb24")
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counter-clockwise
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image


def reason(error: Exception) -> str:
    """Summarise an error of FFmpeg or Pillow in a few words."""
    text = getattr(error, "strerror", None) or str(error)
    return str(text).splitlines()[0][:120] if text else type(error).__name__
