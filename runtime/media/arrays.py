"""Frames that the app passes in memory."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.engines.plugins.prepare_frame.kernel import is_device_frame
from ppllava_edge.runtime.media.container import reason
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, MediaLimits, check_size
from ppllava_edge.runtime.media.readers import Frame, FrameReader

CHANNELS = {"rgb": 3, "bgr": 3, "rgba": 4, "bgra": 4, "gray": 1}  # of an array, by colour order

MAX_FPS = 100_000
LARGEST_SECONDS = 1e12


class ArrayReader(FrameReader):
    """A reader over frames in memory.

    The list is copied, the frames aren't: the app must not draw into them as long as the video is in use.

    Args:
        images: Frames as `rgb_frame` accepts them.
        times: When each was taken, ascending seconds; only the differences and `start` and `end` matter.
        fps: Frames per second, instead of times. Without either, times are the frames' numbers.
        color: The order of their channels; see `rgb_frame`.
        start: Seconds; frames before it are left out. Needs times or fps.
        end: Seconds; frames after it are left out. Needs times or fps.
        limits: max_files frames are accepted, each as large as max_side and max_frame_pixels allow.

    Attributes:
        selected: Numbers of the frames from start to end.
        selected_seconds: How long they last.

    Raises:
        MediaError: If there are no frames, one of them can't be used, or the times don't fit them.
    """

    def __init__(
        self,
        images: Iterable[Any],
        times: Iterable[float] | None = None,
        fps: float | None = None,
        color: str = "rgb",
        start: float | None = None,
        end: float | None = None,
        limits: MediaLimits = DEFAULT_LIMITS,
    ):
        if getattr(images, "ndim", 0) == (2 if color == "gray" else 3):
            raise MediaError("this is a single frame; pass a list: [frame]")
        listed = _listed(images, limits.max_files, "frames")
        self.images = [rgb_frame(image, f"frame {i}", color, limits) for i, image in enumerate(listed)]
        count = len(self.images)
        if not self.images:
            raise MediaError("there are no frames")
        timed = times is not None or fps is not None
        self.seconds, rate = _times(times, fps, count, limits.max_files)
        super().__init__("the frames", count, rate, count / rate)
        self.selected = self._between(start, end, timed)
        self.selected_seconds = (
            self.duration if len(self.selected) == count else self._span(self.selected) + 1 / rate
        )
        if not timed:
            self.notes = ["the frames came without times or fps: their times are their numbers"]

    def _between(self, start: float | None, end: float | None, timed: bool) -> range:
        """The numbers of the frames from start to end."""
        if start is None and end is None:
            return range(self.count)
        if not timed:
            raise MediaError("start and end need to know when the frames were taken: give times or fps")
        for name, value in (("start", start), ("end", end)):
            if value is not None and not _is_finite(value):
                raise MediaError(f"{name} must be seconds, not {value!r}")
        first = 0 if start is None else bisect.bisect_left(self.seconds, start)
        stop = self.count if end is None else bisect.bisect_right(self.seconds, end)
        if first >= stop:
            raise MediaError(
                f"there are no frames from {'the beginning' if start is None else f'{start:g} s'} to "
                f"{'the end' if end is None else f'{end:g} s'}: "
                f"they were taken from {self.seconds[0]:g} to {self.seconds[-1]:g} s"
            )
        return range(first, stop)

    def _span(self, numbers: range) -> float:
        return self.seconds[numbers[-1]] - self.seconds[numbers[0]]

    def frames(self, choice: Callable[[FrameReader], Sequence[int]]) -> Iterator[Frame]:
        """See FrameReader.frames."""
        self.indices = list(choice(self))
        return (Frame(i, self.images[i], self.seconds[i]) for i in sorted(set(self.indices)))


def _listed(values: Iterable[Any], limit: int, what: str) -> list[Any]:
    """A list of an iterable's items, at most `limit`."""
    try:
        listed = list(islice(iter(values), limit + 1))
    except TypeError:
        raise MediaError(
            f"a source is a path or a sequence of frames; {type(values).__name__} isn't a sequence of {what}"
        ) from None
    if len(listed) > limit:
        raise MediaError(f"there are more than {limit} {what}; raise the limit max_files")
    return listed


def _times(
    times: Iterable[float] | None, fps: float | None, count: int, limit: int
) -> tuple[list[float], float]:
    """When each frame was taken, in seconds, and the frames per second on average."""
    if times is not None and fps is not None:
        raise MediaError("give times or fps, not both")
    if times is None:
        if fps is not None and not (_is_finite(fps) and 0 < fps <= MAX_FPS):
            raise MediaError(f"fps must be above 0 and at most {MAX_FPS:g}, not {fps!r}")
        rate = 1.0 if fps is None else float(fps)
        return [i / rate for i in range(count)], rate
    seconds = _listed(times, limit, "times")
    for i, t in enumerate(seconds):
        if not _is_finite(t):
            raise MediaError(f"times must be seconds, but times[{i}] is {t!r}")
        if i and t < seconds[i - 1]:
            raise MediaError(f"times must ascend, but times[{i}] = {t:g} follows {seconds[i - 1]:g}")
    if len(seconds) != count:
        raise MediaError(f"there must be one time for each frame: {len(seconds)} times, {count} frames")
    seconds = [float(t) for t in seconds]
    span = seconds[-1] - seconds[0]
    return seconds, min((count - 1) / span, MAX_FPS) if span > 0 else 1.0


def _is_finite(value: object) -> bool:
    """Whether it is a number, and a plausible one: up to 31 700 years of seconds."""
    try:
        return not isinstance(value, (str, bytes)) and abs(float(value)) < LARGEST_SECONDS  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def rgb_frame(image: Any, what: str, color: str = "rgb", limits: MediaLimits = DEFAULT_LIMITS) -> np.ndarray:
    """Check a frame from the app and view it as an RGB numpy array.

    Args:
        image: A numpy array, or any object that exports DLPack from host memory: uint8 (H, W, 3) for "rgb"
            and "bgr" (OpenCV's order), (H, W, 4) for "rgba" and "bgra" (alpha is ignored), (H, W) or
            (H, W, 1) for "gray".
        what: The frame's name, for error messages.
        color: The order of the channels.
        limits: max_side and max_frame_pixels hold.

    Returns:
        RGB uint8 (H, W, 3); shares memory with the image where the order allows a view. A grey frame's view
        is read-only.

    Raises:
        MediaError: For GPU memory, another shape or dtype, an unknown colour order, or an unusable size.
    """
    if not isinstance(color, str) or color not in CHANNELS:
        raise MediaError(f"color must be {', '.join(CHANNELS)}, not {color!r}")
    if is_device_frame(image):
        raise MediaError(
            f"{what} is in GPU memory; engines on the CPU, and VideoQA.open, take frames in host memory"
        )
    if not isinstance(image, np.ndarray) and hasattr(image, "__dlpack__"):
        try:
            image = np.from_dlpack(image)
        except (RuntimeError, TypeError, ValueError, BufferError) as error:
            raise MediaError(f"{what} can't be read through DLPack: {reason(error)}") from None
    try:
        array: np.ndarray = np.asarray(image)
    except (TypeError, ValueError) as error:
        raise MediaError(f"{what} is not an array ({reason(error)})") from None
    if color == "gray" and array.ndim == 2:
        array = array[:, :, None]
    channels = CHANNELS[color]
    if array.ndim != 3 or array.shape[2] != channels or array.dtype != np.uint8:
        raise MediaError(_wrong_array(array, what, color))
    check_size(array.shape[1], array.shape[0], what, limits)
    if color == "rgb":
        return array
    if color == "gray":
        return np.broadcast_to(array, (*array.shape[:2], 3))
    return array[:, :, :3] if color == "rgba" else array[:, :, 2::-1]


def _wrong_array(array: np.ndarray, what: str, color: str) -> str:
    """What is wrong with an array that isn't a frame, and what to do about it."""
    channels = CHANNELS[color]
    wanted = "(height, width)" if color == "gray" else f"(height, width, {channels})"
    hint = ""
    if array.dtype == object or array.dtype.kind in "US":
        return f"{what} is not a frame: {color} needs a uint8 array {wanted}"
    if array.dtype != np.uint8:
        scale = "; scale values from 0..1 by 255 and round" if array.dtype.kind == "f" else ""
        hint = f"; convert it to uint8, values 0 to 255{scale}"
    elif array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        hint = "; the channels come first: pass frame.transpose(1, 2, 0)"
    elif array.ndim == 4:
        hint = "; pass its frames one by one"
    else:
        found = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
        fitting = [name for name, n in CHANNELS.items() if n == found]
        hint = f"; did you mean color={' or '.join(map(repr, fitting))}?" if fitting else ""
    name = color.upper() if color != "gray" else "grey"
    return f"{what} must be {name} uint8 {wanted}, not {array.dtype} {array.shape}{hint}"
