"""Open video files with FFmpeg: one-line errors, sizes checked before anything large is allocated."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, Budget, MediaLimits, MemoryShortage, check_size
from ppllava_edge.runtime.media.opening.allowed import decoder_options, file_options
from ppllava_edge.runtime.media.opening.paths import display_name, open_regular

FALLBACK_FPS = 25.0  # for files with neither a frame rate nor timestamps
COVER_ART = 0x400  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC


@contextlib.contextmanager
def open_container(
    path: Path, budget: Budget | None = None, options: Mapping[str, str] | None = None
) -> Iterator[tuple[Any, Any]]:
    """Open a video file: a regular file in one of the allowed containers.

    PyAV's log level stays at its default. Any other level makes decoding threads take the GIL to log a
    message; freeing a decoder waits for its threads, so it would sometimes deadlock.

    Args:
        path: The file.
        budget: What reading the file may cost; None: the default limits.
        options: FFmpeg's input options from the app.

    Yields:
        The PyAV container and its video stream, see `video_stream`.

    Raises:
        MediaError: If FFmpeg can't open the file, it has no usable video stream, or reading it took too long.
    """
    import av

    name = display_name(path)
    budget = budget or Budget(name)
    with open_regular(path) as file:
        try:
            container = av.open(
                "fd:",
                options={**file_options(file.fileno(), budget.limits), **(options or {})},
                timeout=budget.remaining,
                metadata_errors="replace",
            )
        except av.error.ExitError:
            raise budget.out_of_time() from None
        except (av.error.FFmpegError, ValueError, MemoryError) as error:
            check_memory(error, name)
            raise MediaError(f"{name} is not a video that can be read ({_why_not_open(error)})") from None
    with container:
        yield container, video_stream(container, name, budget.limits)


def _why_not_open(error: Exception) -> str:
    """FFmpeg says "Invalid argument" of formats that aren't on the list."""
    unknown = getattr(error, "errno", None) == errno.EINVAL
    return "its format isn't one that is read from files" if unknown else reason(error)


def video_stream(container: Any, what: str, limits: MediaLimits = DEFAULT_LIMITS) -> Any:
    """Return the container's first video stream, set up for multithreaded decoding.

    Args:
        container: An open PyAV container.
        what: The file or address, for error messages.
        limits: What the file may cost.

    Raises:
        MediaError: If there is no video stream, its codec is unknown, its frames have an unusable size, or
            there are too many streams.
    """
    if len(container.streams) > limits.max_streams:
        raise MediaError(
            f"{what} has more than {limits.max_streams} streams; the limit max_streams forbids it"
        )
    streams = [s for s in container.streams.video if not _is_cover_art(s)]
    if not streams:
        holds = "only sound" if container.streams.audio else "no video"
        raise MediaError(f"{what} holds {holds}; a video stream is needed")
    stream = streams[0]
    codec = stream.codec_context
    if codec is None:
        raise MediaError(f"{what} uses a video codec that this FFmpeg doesn't know")
    check_size(codec.width, codec.height, what, limits, unknown_allowed=True)
    codec.options = decoder_options(codec.options, limits)
    stream.thread_type = "AUTO"
    return stream


def read_packets(container: Any, stream: Any, budget: Budget | None = None) -> Iterator[Any]:
    """Yield a stream's packets, compressed frames in decoding order; empty ones mark the end.

    See read_all_packets.
    """
    return (packet for packet in read_all_packets(container, stream, budget) if packet is not None)


def read_all_packets(container: Any, stream: Any, budget: Budget | None = None) -> Iterator[Any]:
    """As read_packets, with None for each packet of another stream.

    A file or a server may send any amount of sound without a frame: the caller looks at its clock meanwhile.
    Reading stops with MediaError when the budget's time is over, also inside FFmpeg.

    PyAV raises IndexError where a new stream begins in the middle of a file (joined transport streams,
    damaged ones). It is raised as FFmpeg's error for invalid data.
    """
    import av

    try:
        for packet in container.demux():
            # Not stream_index: the empty packets at the end all say 0, whatever stream they flush.
            yield packet if packet.stream.index == stream.index else None
            if budget is not None:
                budget.check()
    except av.error.ExitError:
        if budget is None:
            raise
        raise budget.out_of_time() from None
    except IndexError:
        raise av.error.InvalidDataError(-1, "a stream begins in the middle of the file") from None


def _is_cover_art(stream: Any) -> bool:
    """Whether a video stream is album art: a single picture attached to a sound file."""
    return bool(int(stream.disposition) & COVER_ART)


def to_rgb(frame: Any, what: str) -> np.ndarray:
    """Convert a decoded frame to RGB uint8 (H, W, 3), rotated as its metadata asks.

    Args:
        frame: A PyAV frame; its size must have been checked.
        what: The file or address, for error messages.

    Raises:
        MediaError: If FFmpeg can't convert its pixels, or there is no memory for them.
    """
    import av

    try:
        image: np.ndarray = frame.to_ndarray(format="rgb24")
        degrees = float(getattr(frame, "rotation", 0))
    except (av.error.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        check_memory(error, what)
        kind = getattr(frame.format, "name", "unknown")
        raise MediaError(f"{what}: {kind} pixels can't be converted to RGB ({reason(error)})") from None
    quarter_turns = round(degrees / 90) % 4 if math.isfinite(degrees) else 0  # counter-clockwise
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image


def check_memory(error: Exception, what: str) -> None:
    """Raise MemoryShortage if FFmpeg had no memory for data or for a thread: the file isn't damaged."""
    if isinstance(error, (MemoryError, BlockingIOError)):
        raise MemoryShortage(what) from None


def reason(error: Exception) -> str:
    """Summarise an error of FFmpeg or Pillow in a few words."""
    text = getattr(error, "strerror", None) or str(error)
    lines = str(text).splitlines()
    return display_name(lines[0])[:120] if lines and lines[0].strip() else type(error).__name__
