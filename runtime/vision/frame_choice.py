"""Choose the frames of a video that the model sees, exactly as upstream chooses them."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.readers import Frame, FrameReader, Frames, open_reader

MAX_FRAMES = 4096  # maximum of one sample
MAX_AUTO_FRAMES = 512  # with frames="auto"
WHOLE_VIDEO = (-100000.0, 100000.0)  # seconds; upstream's bound of a whole video


def sample_indices(
    count: int, fps: float, frames: int, bound: tuple[float, float] | None = None, first: int = 0
) -> list[int]:
    """Take the middle frame of each of `frames` equal segments of a video (upstream's get_index).

    Args:
        count: Frames of the video.
        fps: Frames per second.
        frames: How many to take; short videos repeat some.
        bound: Start and end in seconds; None: the whole video. If there is no frame between them, the result
            is outside the bound, as upstream's is; `check_range` refuses such bounds.
        first: The smallest frame number to take.

    Returns:
        Frame numbers, ascending.
    """
    low, high = _first_and_last(count, fps, bound, first)
    segment = float(high - low) / frames
    return [int(low + segment / 2 + np.round(segment * i)) for i in range(frames)]


def choose_frames(
    reader: FrameReader, frames: int, start: float | None = None, end: float | None = None
) -> list[int]:
    """Take the middle frame of each of `frames` equal segments of a source.

    Args:
        reader: The source; if it says takes_all, all its frames are taken, however many are asked for.
        frames: How many, 1 to MAX_FRAMES; short videos repeat some.
        start: Seconds; None: the source's beginning.
        end: Seconds; None: the source's end.

    Returns:
        Frame numbers, ascending.

    Raises:
        MediaError: If a number or a time is out of range, or there is no frame between start and end.
    """
    if reader.takes_all:
        return list(range(reader.count))
    if not 1 <= frames <= MAX_FRAMES:
        raise MediaError(f"frames must be from 1 to {MAX_FRAMES}, not {frames}")
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (0 <= value < 1e9):
            raise MediaError(f"{name} must be 0 or more seconds, not {value:g}")
    bound = None
    if start is not None or end is not None:
        bound = start or 0.0, WHOLE_VIDEO[1] if end is None else end
    check_range(reader.count, reader.fps, bound, reader.what)
    return sample_indices(reader.count, reader.fps, frames, bound)


def check_range(count: int, fps: float, bound: tuple[float, float] | None, what: str) -> None:
    """Refuse a range of a video that holds no frames.

    Args:
        count: Frames of the video.
        fps: Frames per second.
        bound: Start and end in seconds; None: the whole video.
        what: The video, for the message.

    Raises:
        MediaError: If the range, or the video, is empty.
    """
    if count < 1:
        raise MediaError(f"{what} has no frames")
    first, last = _first_and_last(count, fps, bound, 0)
    if bound and (bound[1] < bound[0] or first > last):
        until = "on" if bound[1] == WHOLE_VIDEO[1] else f"to {bound[1]:g} s"
        raise MediaError(
            f"there are no frames of {what} from {bound[0]:g} s {until}: it lasts {count / fps:.2f} s"
        )


def _first_and_last(count: int, fps: float, bound: tuple[float, float] | None, first: int) -> tuple[int, int]:
    """The first and the last frame of a range."""
    start, end = bound or WHOLE_VIDEO
    return max(first, round(start * fps)), min(round(end * fps), count - 1)


def frames_for_length(duration: float, default: int, limit: int | None, step: int = 1) -> int:
    """Decide how many frames frames="auto" takes: one every two seconds, from the default to 8 times that.

    Args:
        duration: Seconds of the video.
        default: The model's default number of frames.
        limit: Maximum number of frames that its temporal adapter supports; None: no limit.
        step: Frames of a pooling window; the result is a multiple of it, if the limit allows.
    """
    most = min(limit or 8 * default, MAX_AUTO_FRAMES)
    count = min(max(round(min(most, duration / 2)), default), most)  # infinite and NaN: most
    return max(count // step * step, min(step, most))


def read_frames(
    source: str | os.PathLike[str],
    frames: int,
    start: float | None = None,
    end: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Frames:
    """Sample frames of a video file, an image, an animation or a folder of images.

    Args:
        source: The path.
        frames: How many; see `choose_frames`.
        start: Seconds; None: the source's beginning.
        end: Seconds; None: the source's end.
        progress: Called with (frames read, frames to read).

    Raises:
        MediaError: If the source is unusable; in one line.
    """
    reader = open_reader(source)
    found: dict[int, Frame] = {}
    for frame in reader.frames(lambda r: choose_frames(r, frames, start, end)):
        found[frame.number] = frame
        if progress:
            progress(len(found), len(set(reader.indices)))
    return Frames(
        images=[found[i].image for i in reader.indices],
        indices=reader.indices,
        times=[found[i].seconds for i in reader.indices],
        count=reader.count,
        fps=reader.fps,
        duration=reader.duration,
        kind=reader.kind,
        notes=reader.notes,
    )
