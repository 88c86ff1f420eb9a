"""Read chosen frames of a video file, an image, an animation or a folder of images.

Only what the chosen frames need is decoded, and only those frames are converted to RGB. Sizes are checked
before anything large is allocated. A damaged file gives the frames that can be decoded, and a note that
says so.
"""

from __future__ import annotations

import os
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.container import check_memory, open_container, read_packets, to_rgb
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, Budget, MediaLimits
from ppllava_edge.runtime.media.opening.paths import display_name, source_name, stat_source
from ppllava_edge.runtime.media.packet_cursor import CannotSeek
from ppllava_edge.runtime.media.packet_index import index_packets
from ppllava_edge.runtime.media.pictures import ImageFile, ImageFolder, Pictures
from ppllava_edge.runtime.media.seeking import is_worthwhile, seek_frames

MAX_ERRORS = 1000  # packets that may fail before a sequential decode stops


class Frame(NamedTuple):
    """One frame of a source.

    Attributes:
        number: Its position in the source, from 0.
        image: RGB uint8 (H, W, 3).
        seconds: When it is shown.
    """

    number: int
    image: np.ndarray
    seconds: float


@dataclass
class Frames:
    """The sampled frames of a source.

    Attributes:
        images: RGB uint8 (H, W, 3) each.
        indices: Their numbers in the source; short sources repeat some.
        times: When each frame is shown, in seconds.
        count: Frames of the whole source.
        fps: The source's frames per second.
        duration: The source's duration in seconds.
        kind: "video" or "image".
        notes: Notes for the user (a truncated file, say).
    """

    images: list[np.ndarray]
    indices: list[int]
    times: list[float]
    count: int
    fps: float
    duration: float
    kind: str = "video"
    notes: list[str] = field(default_factory=list)


class FrameReader(ABC):
    """A source whose frames are chosen by number, then read one after another.

    Args:
        what: The source's name, for error messages.
        count: Frames of the whole source.
        fps: Frames per second.
        duration: Seconds of the whole source.

    Attributes:
        kind: "video" or "image".
        takes_all: Every frame is used, however many are asked for (a single image).
        indices: The last choice, without frames that turned out to be missing. Final once `frames` is
            exhausted.
        notes: Notes for the user. Final once `frames` is exhausted.
        reading: Held by threads that share the reader while they read frames: it has only one choice.
    """

    kind = "video"
    takes_all = False

    def __init__(self, what: str, count: int, fps: float, duration: float):
        self.what = what
        self.count = count
        self.fps = fps
        self.duration = duration
        self.indices: list[int] = []
        self.notes: list[str] = []
        self.reading = threading.Lock()

    def close(self) -> None:  # noqa: B027 – most readers hold nothing
        """Release what is held until the frames are read. They can still be read afterwards."""

    @abstractmethod
    def frames(self, choice: Callable[[FrameReader], Sequence[int]]) -> Iterator[Frame]:
        """Read the chosen frames.

        A damaged file can hold fewer frames than it promised. Then `choice` is called again, and all frames
        of the new choice are yielded; afterwards `indices` lists the frames that count.

        Args:
            choice: Gets this reader (count, fps, duration) and returns frame numbers.

        Yields:
            Every chosen frame once, ascending.

        Raises:
            MediaError: If no frame can be decoded.
        """


def open_reader(source: str | bytes | os.PathLike[str], limits: MediaLimits = DEFAULT_LIMITS) -> FrameReader:
    """Open a video file, an image, an animation or a folder of images.

    Nothing but regular files is ever opened; links are followed.

    Args:
        source: The path.
        limits: What the source may cost.

    Raises:
        MediaError: If the source is unusable; in one line.
    """
    path = Path(source_name(source))
    if stat.S_ISDIR(stat_source(path).st_mode):
        what = f"the folder {display_name(path)}"
        return PictureReader(ImageFolder(path, Budget(what, limits)), what, limits)
    budget = Budget(display_name(path), limits)
    pictures = ImageFile.recognised(path, budget)
    if pictures is not None:
        return PictureReader(pictures, budget.what, limits)
    return VideoReader(path, limits)


class VideoReader(FrameReader):
    """A video file.

    Args:
        path: The file.
        limits: What the file may cost.
        seeking: Allow decoding from key frames, where it saves work. The frames are the same either way.

    Raises:
        MediaError: If the file can't be opened or holds no frame.
    """

    def __init__(self, path: Path, limits: MediaLimits = DEFAULT_LIMITS, seeking: bool = True):
        self.path = path
        self.limits = limits
        self.seeking = seeking
        self._budget = Budget(display_name(path), limits)
        self.index = index_packets(path, self._budget)
        super().__init__(self._budget.what, self.index.count, self.index.fps, self.index.duration)
        self._damaged = False

    def frames(self, choice: Callable[[FrameReader], Sequence[int]]) -> Iterator[Frame]:
        """See FrameReader.frames. Seeks if that pays, and decodes sequentially what seeking can't find."""
        self._budget = Budget(self.what, self.limits)
        yield from self._budget.metered(self._chosen_frames(choice))

    def _chosen_frames(self, choice: Callable[[FrameReader], Sequence[int]]) -> Iterator[Frame]:
        """`frames`, without counting what they cost."""
        self.indices = list(choice(self))
        done = set[int]()
        if self.seeking and self.index.seekable and is_worthwhile(self.index, self.indices):
            try:
                yield from self._seek(done)
                self._add_note()
                return
            except CannotSeek:
                if self._reindex():
                    self.indices = list(choice(self))
                    done.clear()
        decoded = yield from self._decode(set(self.indices) - done)
        if not set(self.indices) <= done | decoded.numbers:
            yield from self._choose_again(choice, decoded.total)
        self._add_note()

    def _seek(self, done: set[int]) -> Iterator[Frame]:
        """Yield the chosen frames by seeking, adding their numbers to `done`."""
        for number, image, seconds, damaged in seek_frames(self.path, self.indices, self.index, self._budget):
            self._damaged = self._damaged or damaged
            done.add(number)
            yield Frame(number, image, seconds)

    def _reindex(self) -> bool:
        """Index all packets instead of trusting the container's table. Returns whether `count` changed."""
        if not self.index.from_table:
            return False
        previous_count = self.index.count
        self.index = index_packets(self.path, self._budget, table=False)
        self.count, self.fps, self.duration = self.index.count, self.index.fps, self.index.duration
        return previous_count != self.count

    def _choose_again(self, choice: Callable[[FrameReader], Sequence[int]], count: int) -> Iterator[Frame]:
        """Choose among the `count` frames that can be decoded: fewer frames came out than packets went in."""
        if count == 0:
            raise self._no_frames_error()
        self.count = count
        self.duration = count / self.fps
        self.indices = list(choice(self))
        decoded = yield from self._decode(set(self.indices))
        self.indices = [i for i in self.indices if i in decoded.numbers]
        if not self.indices:
            raise self._no_frames_error()

    def _no_frames_error(self) -> MediaError:
        return MediaError(f"no frame of {self.what} could be decoded; the file is damaged")

    def _decode(self, wanted: set[int]) -> Generator[Frame, None, _Decoded]:
        """Decode from the beginning up to the last wanted frame."""
        last = max(wanted, default=-1)
        number = 0
        numbers = set[int]()
        with open_container(self.path, self._budget) as (container, stream):
            size = stream.codec_context.width, stream.codec_context.height
            self._budget.expect(last + 1, *size)
            batches = self._decode_packets(read_packets(container, stream, self._budget))
            while number <= last and (batch := next(batches, None)) is not None:
                for frame in batch:
                    self._damaged = self._damaged or bool(frame.is_corrupt)
                    self._budget.add(frame.width, frame.height)
                    if number in wanted:
                        numbers.add(number)
                        yield Frame(number, to_rgb(frame, self.what), self._seconds(frame, number))
                    number += 1
        return _Decoded(numbers, number)

    def _decode_packets(self, packets: Iterator[Any]) -> Iterator[list[Any]]:
        """Yield the frames that come out with each packet; damaged packets are skipped, up to MAX_ERRORS."""
        import av

        errors = 0
        while errors <= MAX_ERRORS:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                batch = packet.decode()
            except av.error.FFmpegError as error:
                check_memory(error, self.what)
                self._damaged = True
                errors += 1
                continue
            yield batch

    def _seconds(self, frame: Any, number: int) -> float:
        """When a decoded frame is shown; from the frame rate if it has no timestamp."""
        if frame.pts is None or not frame.time_base:
            return number / self.index.fps
        return max(float(frame.pts * frame.time_base) - self.index.origin * self.index.time_base, 0.0)

    def _add_note(self) -> None:
        name, promised = display_name(self.path.name), self.index.promised
        if self.count < promised:
            self.notes = [
                f"{name} is truncated or damaged: "
                f"answering from the {self.count} of {promised} frames that could be decoded"
            ]
        elif self._damaged or self.index.broken:
            self.notes = [f"{name} is damaged: some of its frames may be corrupted"]


class _Decoded(NamedTuple):
    """The result of a sequential decode: which wanted frames came out, and how many frames in all."""

    numbers: set[int]
    total: int


class PictureReader(FrameReader):
    """An image, an animation, or a folder of images.

    Args:
        pictures: One for an image, several for an animation or folder.
        what: The source's name, for error messages.
        limits: What reading may cost.
    """

    def __init__(self, pictures: Pictures, what: str, limits: MediaLimits = DEFAULT_LIMITS):
        self.pictures, self.limits = pictures, limits
        count = len(pictures.seconds)
        self.starts = np.concatenate([[0.0], np.cumsum(pictures.seconds)])
        duration = 0.0 if count == 1 else float(self.starts[-1])
        super().__init__(what, count, 1.0 if count == 1 else count / duration, duration)
        self.kind = "image" if count == 1 else "video"
        self.takes_all = count == 1

    def frames(self, choice: Callable[[FrameReader], Sequence[int]]) -> Iterator[Frame]:
        """See FrameReader.frames."""
        self.indices = list(choice(self))
        budget = Budget(self.what, self.limits)
        for i, image in budget.metered(self.pictures.read(sorted(set(self.indices)), budget)):
            yield Frame(i, image, float(self.starts[i]))
