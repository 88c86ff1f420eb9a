"""Limits on what a source may cost: sizes, pixels, streams, packets, time and memory."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from ppllava_edge.engines.errors import MediaError

MIN_SIDE = 8  # pixels
T = TypeVar("T")
LARGEST = 2**62  # of any limit


@dataclass(frozen=True)
class MediaLimits:
    """What a source may cost. The defaults suit edge machines: an hour of 4K video passes.

    Attributes:
        max_side: Pixels; the longer side of a frame.
        max_frame_pixels: Width x height of a frame.
        max_pixels: Frames x area decoded from one video file each time its frames are read.
        max_animation_pixels: Frames x area of a GIF, APNG or WebP animation.
        max_streams: Video, sound and other streams in one file.
        max_packets: Compressed frames of a video stream (10 million: 46 hours at 60 a second).
        max_files: Images in a folder, and frames in an animation.
        decode_seconds: Wall clock of opening a source, and again of each time its frames are read; None: no
            limit. Waiting for the engine doesn't count.
        memory: Bytes of address space of the isolated decoding process (isolate=True).

    Raises:
        MediaError: If a limit isn't a number above 0.
    """

    max_side: int = 16384
    max_frame_pixels: int = 8192 * 8192
    max_pixels: int = 4 * 10**12
    max_animation_pixels: int = 10**9
    max_streams: int = 64
    max_packets: int = 10**7
    max_files: int = 100_000
    decode_seconds: float | None = None
    memory: int = 4 * 2**30

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "decode_seconds":
                fits = value is None or (_is_number(value, (int, float)) and 0 < value < math.inf)
            else:
                fits = _is_number(value, int) and 1 <= value <= LARGEST
            if not fits:
                kind = "seconds" if field.name == "decode_seconds" else "a whole number"
                raise MediaError(f"the limit {field.name} must be {kind} above 0, not {value!r}")

    @classmethod
    def parse(cls, assignments: Iterable[str]) -> MediaLimits:
        """Read limits from the command line.

        Args:
            assignments: NAME=VALUE each, as in "max_side=8192", "max_pixels=2e9" or "decode_seconds=none".

        Returns:
            These limits, and the defaults for the others.

        Raises:
            MediaError: If a name is unknown, or a value isn't a number above 0.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        values: dict[str, float | None] = {}
        for assignment in assignments:
            name, equals, text = (part.strip() for part in assignment.partition("="))
            if not equals:
                raise MediaError(f"a limit is given as NAME=VALUE, not {assignment!r}")
            if name not in names:
                raise MediaError(f"there is no limit {name!r}; the limits are {', '.join(names)}")
            values[name] = _number(name, text)
        return cls(**values)  # type: ignore[arg-type]


def _is_number(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _number(name: str, text: str) -> float | None:
    """A limit's value from the command line."""
    if name == "decode_seconds" and text.lower() == "none":
        return None
    try:
        value = int(text)
    except ValueError:
        try:
            parsed = float(text)
        except ValueError:
            raise MediaError(f"the limit {name} must be a number, not {text!r}") from None
        whole = math.isfinite(parsed) and parsed == int(parsed) and name != "decode_seconds"
        return int(parsed) if whole else parsed
    return value


DEFAULT_LIMITS = MediaLimits()


class MemoryShortage(MediaError):
    """A source needs more memory than there is, or than the process that decodes it may use."""

    def __init__(self, what: str):
        super().__init__(f"{what} needs more memory than there is")


class Budget:
    """What reading a source has cost so far, checked against its limits.

    Args:
        what: The source's name, for error messages.
        limits: Its limits.
    """

    def __init__(self, what: str, limits: MediaLimits = DEFAULT_LIMITS):
        self.what, self.limits = what, limits
        self.pixels = 0
        self._spent = 0.0  # seconds, up to _resumed
        self._resumed = time.monotonic()

    @property
    def remaining(self) -> float | None:
        """Seconds left; None: no limit."""
        if self.limits.decode_seconds is None:
            return None
        return max(self.limits.decode_seconds - self._spent - (time.monotonic() - self._resumed), 0.0)

    def check(self) -> None:
        """Raise MediaError if the time is spent."""
        if self.remaining == 0:
            raise self.out_of_time()

    def out_of_time(self) -> MediaError:
        """The error for a source that took too long."""
        return MediaError(
            f"{self.what} took longer than {self.limits.decode_seconds:g} s to decode; "
            "take a shorter part, or raise the limit decode_seconds"
        )

    def add(self, width: int, height: int) -> None:
        """Count a decoded frame. Raises MediaError if it is too large, or the source has cost too much."""
        check_size(width, height, self.what, self.limits)
        self.expect(1, width, height)
        self.pixels += width * height
        self.check()

    def expect(self, frames: int, width: int, height: int) -> None:
        """Raise MediaError if so many more frames would cost too much."""
        if self.pixels + frames * width * height > self.limits.max_pixels:
            raise MediaError(
                f"more than {self.limits.max_pixels:.3g} pixels of {self.what} would have to be decoded; "
                "cut out a part, or raise the limit max_pixels"
            )

    def metered(self, items: Iterator[T]) -> Iterator[T]:
        """Pass items on, not counting the time that their consumer takes."""
        self._resumed = time.monotonic()
        try:
            for item in items:
                self._spent += time.monotonic() - self._resumed
                yield item
                self._resumed = time.monotonic()
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()


def check_size(
    width: int, height: int, what: str, limits: MediaLimits = DEFAULT_LIMITS, unknown_allowed: bool = False
) -> None:
    """Refuse frames that are too small to show anything or too large to allocate.

    Args:
        width: Pixels.
        height: Pixels.
        what: The file, for error messages.
        limits: max_side and max_frame_pixels are checked.
        unknown_allowed: Accept a size of 0, as in headers that leave the size to the frames.

    Raises:
        MediaError: If the size is out of bounds.
    """
    if unknown_allowed and not (width and height):
        return
    if min(width, height) < MIN_SIDE:
        raise MediaError(
            f"{what}: frames of {width}x{height} pixels are too small; the minimum is {MIN_SIDE}x{MIN_SIDE}"
        )
    if max(width, height) > limits.max_side or width * height > limits.max_frame_pixels:
        raise MediaError(
            f"{what}: frames of {width}x{height} pixels are too large; scale them down below "
            f"{limits.max_frame_pixels / 10**6:.3g} megapixels and {limits.max_side} pixels a side, "
            "or raise the limits max_frame_pixels and max_side"
        )
