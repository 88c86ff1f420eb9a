"""Frames of files: any container and codec that FFmpeg opens, images, animations, and folders of images.

Only chosen frames are decoded as far as they must be, and converted to RGB. Sizes are checked before anything large is allocated. Damaged files
give the frames that can be decoded, and a note that says so.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.container import apply_rotation, check_size, open_container
from ppllava_edge.runtime.media.packet_index import index_packets
from ppllava_edge.runtime.media.pictures import Picture, animation_pictures, folder_pictures, open_picture
from ppllava_edge.runtime.media.seeking import CannotSeek, is_worthwhile, seek_frames

MAX_ERRORS = 1000  # packets that may fail before a file is given up


class Frame(NamedTuple):
    """One frame. number: which of the video. image: RGB uint8 (H,W,3). seconds: when it is shown."""

    number: int
    image: np.ndarray
    seconds: float


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


class FrameReader(ABC):
    """A source whose frames are chosen, then read one after another. count, fps, duration (seconds): of the whole source.

    indices: the frames of the last choice that there are; notes: what people should know. Both are final when `frames` is exhausted.
    takes_all: every frame is used, whatever was asked for (frames that the app gives, a single picture).
    """

    kind = "video"
    takes_all = False

    def __init__(self, what: str, count: int, fps: float, duration: float):
        self.what, self.count, self.fps, self.duration = what, count, fps, duration
        self.indices: list[int] = []
        self.notes: list[str] = []

    @abstractmethod
    def frames(self, choice: Callable[[FrameReader], Sequence[int]]) -> Iterator[Frame]:
        """Yield every chosen frame once, ascending. If fewer can be decoded than the file promised, choice is asked again and all of the new choice
        is yielded; `indices` tells in the end which frames count. Raises MediaError if there is none."""


def open_reader(source: str | os.PathLike[str]) -> FrameReader:
    """A reader for a video file, an image, an animation or a folder of images. Raises MediaError in one line for anything unusable."""
    path = Path(source)
    if path.is_dir():
        return PictureReader(folder_pictures(path), f"the folder {path}")
    if not path.exists():
        raise MediaError(f"no such file: {source}")
    if not path.is_file():
        raise MediaError(f"{source} is not a regular file")
    if path.stat().st_size == 0:
        raise MediaError(f"{source} is empty (0 bytes)")
    picture = open_picture(path)
    return PictureReader(animation_pictures(picture), str(path)) if picture is not None else VideoReader(path)


class VideoReader(FrameReader):
    """A video file. seeking: may frames be found from key frames (the same frames come out either way)."""

    def __init__(self, path: Path, seeking: bool = True):
        self.path, self.seeking, self.index = path, seeking, index_packets(path)
        super().__init__(str(path), self.index.count, self.index.fps, self.index.duration)
        self._damaged = False

    def frames(self, choice: Callable[[FrameReader], Sequence[int]]) -> Iterator[Frame]:
        """As FrameReader says."""
        self.indices = list(choice(self))
        done = set[int]()
        if self.seeking and self.index.seekable and is_worthwhile(self.index, self.indices):
            try:
                yield from self._seek(done)
                self._note()
                return
            except CannotSeek:
                if self._index_again():
                    self.indices, done = list(choice(self)), set()
        came = yield from self._decode(set(self.indices) - done)
        if (
            not set(self.indices) <= done | came.found
        ):  # fewer frames came out than packets went in: choose again among those that did
            if came.decoded == 0:
                raise MediaError(f"no frame of {self.path} could be decoded; the file is damaged")
            self.count, self.duration = came.decoded, came.decoded / self.fps
            self.indices = list(choice(self))
            came = yield from self._decode(set(self.indices))
            self.indices = [i for i in self.indices if i in came.found]
            if not self.indices:
                raise MediaError(f"no frame of {self.path} could be decoded; the file is damaged")
        self._note()

    def _seek(self, done: set[int]) -> Iterator[Frame]:
        for index, image, seconds, damaged in seek_frames(self.path, self.indices, self.index):
            self._damaged = self._damaged or damaged
            done.add(index)
            yield Frame(index, image, seconds)

    def _index_again(self) -> bool:
        """Read all packets instead of trusting the container's table. Returns whether it had said something else."""
        if not self.index.from_table:
            return False
        said = self.index.count
        self.index = index_packets(self.path, table=False)
        self.count, self.fps, self.duration = self.index.count, self.index.fps, self.index.duration
        return said != self.count

    def _decode(self, wanted: set[int]) -> Generator[Frame, None, _Decoded]:
        """Decode from the beginning up to the last wanted frame."""
        import av

        found, at, last, errors = set[int](), 0, max(wanted, default=-1), 0
        with open_container(self.path) as (container, stream):
            packets = container.demux(stream)
            while at <= last:
                try:
                    packet = next(packets, None)
                    decoded = packet.decode() if packet is not None else []
                except av.error.FFmpegError:
                    self._damaged, errors = True, errors + 1
                    if errors > MAX_ERRORS:
                        break
                    continue
                if packet is None:
                    break
                for frame in decoded:
                    self._damaged = self._damaged or bool(frame.is_corrupt)
                    if at in wanted:
                        check_size(frame.width, frame.height, self.what)
                        found.add(at)
                        yield Frame(at, apply_rotation(frame), self._seconds(frame, at))
                    at += 1
        return _Decoded(found, at)

    def _seconds(self, frame: object, at: int) -> float:
        pts, base = getattr(frame, "pts", None), getattr(frame, "time_base", None)
        return (
            max(float(pts * base) - self.index.origin * self.index.time_base, 0.0)
            if pts is not None and base
            else at / self.index.fps
        )

    def _note(self) -> None:
        name, index = self.path.name, self.index
        if self.count < index.promised:
            self.notes = [
                f"{name} is truncated or damaged: answering from the {self.count} of {index.promised} frames that could be decoded"
            ]
        elif self._damaged or index.broken:
            self.notes = [f"{name} is damaged: some of its frames may not show what they should"]


class _Decoded(NamedTuple):
    """What a sequential decode gave: which wanted frames, and how many frames there were."""

    found: set[int]
    decoded: int


class PictureReader(FrameReader):
    """An image, an animation, or a folder of images."""

    def __init__(self, pictures: Sequence[Picture], what: str):
        self.pictures = pictures
        self.starts = np.concatenate([[0.0], np.cumsum([seconds for _, seconds in pictures])])
        single = len(pictures) == 1
        duration = 0.0 if single else float(self.starts[-1])
        super().__init__(what, len(pictures), 1.0 if single else len(pictures) / duration, duration)
        self.kind = "image" if single else "video"
        self.takes_all = single

    def frames(self, choice: Callable[[FrameReader], Sequence[int]]) -> Iterator[Frame]:
        """As FrameReader says."""
        self.indices = list(choice(self))
        for i in sorted(set(self.indices)):
            yield Frame(i, self.pictures[i][0](), float(self.starts[i]))
