"""Which frames of a video the model looks at, exactly as upstream chooses them."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.readers import Frame, FrameReader, Frames, open_reader

MAX_AUTO = 512  # frames that --frames auto takes at most
WHOLE = (-100000.0, 100000.0)  # seconds: the bound of a whole video, upstream's


def sample_indices(
    count: int, fps: float, frames: int, bound: tuple[float, float] | None = None, first: int = 0
) -> list[int]:
    """The middle frame of each of `frames` equal segments of a video of `count` frames (upstream's get_index).

    bound: (start, end) in seconds. Short videos repeat frames. A range without frames gives indices outside it, as upstream does:
    check_range refuses it before.
    """
    first_index, last_index = _ends(count, fps, bound, first)
    segment = float(last_index - first_index) / frames
    return [int(first_index + segment / 2 + np.round(segment * i)) for i in range(frames)]


def choose_frames(
    reader: FrameReader, frames: int, start: float | None = None, end: float | None = None
) -> list[int]:
    """The middle frame of each of so many equal parts of a source.

    Args:
        reader: The source; all frames of one that says so (takes_all) are chosen, whatever was asked for.
        frames: How many, 1 to MAX_FRAMES. Frames of short videos repeat.
        start, end: Seconds; None: the source's own.

    Returns:
        Frame numbers, ascending.

    Raises:
        MediaError: For a number or a time out of range, or if no frame lies between start and end.
    """
    if reader.takes_all:
        return list(range(reader.count))
    if not 1 <= frames <= MAX_FRAMES:
        raise MediaError(f"--frames must be from 1 to {MAX_FRAMES}, not {frames}")
    for name, value in (("--start", start), ("--end", end)):
        if value is not None and not (0 <= value < 1e9):
            raise MediaError(f"{name} must be 0 or more seconds, not {value:g}")
    bound = None if start is None and end is None else (start or 0.0, WHOLE[1] if end is None else end)
    check_range(reader.count, reader.fps, bound, reader.what)
    return sample_indices(reader.count, reader.fps, frames, bound)


def check_range(count: int, fps: float, bound: tuple[float, float] | None, what: str) -> None:
    """Raise MediaError if no frame of a video lies between the bound's (start, end) seconds. what: the video, for the message."""
    if count < 1:
        raise MediaError(f"{what} has no frames")
    first_index, last_index = _ends(count, fps, bound, 0)
    if bound and (bound[1] < bound[0] or first_index > last_index):
        upto = "on" if bound[1] == WHOLE[1] else f"to {bound[1]:g} s"
        raise MediaError(
            f"there are no frames of {what} from {bound[0]:g} s {upto}: it lasts {count / fps:.2f} s"
        )


def _ends(count: int, fps: float, bound: tuple[float, float] | None, first: int) -> tuple[int, int]:
    start, end = bound or WHOLE
    return max(first, round(start * fps)), min(round(end * fps), count - 1)


def frames_for_length(duration: float, default: int, limit: int | None, step: int = 1) -> int:
    """How many frames a video of so many seconds gets from --frames auto: one every two seconds, from the model's default to 8 times that.

    limit: what the temporal adapter knows at most. step: frames of a pooling window; the number is a multiple of it.
    """
    most = min(limit or 8 * default, MAX_AUTO)
    wanted = min(max(round(duration / 2), default), most)
    return max(wanted // step * step, min(step, most))


def frames_for_duration(seconds_per_frame: float, duration: float) -> int:
    """32 or 64 frames, by a clip's duration in seconds (upstream's negative num_segments: 64 when it has more than 32 such steps)."""
    return 32 if duration / seconds_per_frame <= 32 else 64


def centred_indices(total: int, wanted: int) -> list[int]:
    """The centre of each of `wanted` equal parts of total-1 (upstream's get_seq_frames)."""
    size = float(total - 1) / wanted
    return [(int(np.round(size * i)) + int(np.round(size * (i + 1)))) // 2 for i in range(wanted)]


def middle_indices(frames: int, count: int) -> list[int]:
    """The middle of `frames` intervals over count frames, padded with the last (upstream's get_frame_indices, mode "middle")."""
    used = min(frames, count)
    edges = np.linspace(start=0, stop=count, num=used + 1).astype(int)
    found = [(int(low) + int(high) - 1) // 2 for low, high in pairwise(edges)]
    return found + [found[-1]] * (frames - len(found))


def indices_at_rate(rate: float, count: int, fps: float, most: int = -1) -> list[int]:
    """One frame every 1/rate seconds, each in the middle of its step (upstream's get_frame_indices, mode "fpsX")."""
    duration, step = float(count) / fps, 1 / rate
    seconds = np.arange(0 + step / 2, duration + step / 2, step)
    found = [int(i) for i in np.around(seconds * fps).astype(int) if i < count]
    return found[:most] if most > 0 else found


MAX_FRAMES = 4096  # that can be sampled at once


def read_frames(
    source: str | os.PathLike[str],
    frames: int,
    start: float | None = None,
    end: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Frames:
    """Sample `frames` frames between start and end (seconds) from a video file, an image, an animation or a folder of images.

    progress: called with (frames read, frames to read). Raises MediaError in one line for anything unusable.
    """
    reader = open_reader(source)
    found: dict[int, Frame] = {}
    for frame in reader.frames(lambda r: choose_frames(r, frames, start, end)):
        found[frame.number] = frame
        if progress:
            progress(len(found), len(set(reader.indices)))
    return Frames(
        [found[i].image for i in reader.indices],
        reader.indices,
        [found[i].seconds for i in reader.indices],
        reader.count,
        reader.fps,
        reader.duration,
        reader.kind,
        reader.notes,
    )
