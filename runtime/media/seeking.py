"""Decoding chosen frames of a file: from the key frame before each, not from the file's beginning; the very frames that a full decode gives.

What is decoded on the way and not wanted is skipped where nothing refers to it (H.264 and MPEG-2 mark such frames). A frame that doesn't come out
whole is tried again from an earlier key frame: open groups of pictures and gradual refreshes refer back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.runtime.media.container import apply_rotation, check_size, open_container
from ppllava_edge.runtime.media.packet_index import PacketIndex

SKIPPABLE = {"h264", "mpeg2video"}  # codecs in which a frame marked so is referred to by nothing at all
SKIPPED = 0.6  # of the time that decoding takes, where such frames are left out
WORTH_SEEKING = 0.7  # of the work of a sequential decode
FEW = 100  # frames, decoded sooner than thought about
STEPS_BACK = (0, 1, 2, 8)  # key frames before the nearest from which a frame is tried
ERRORS_ALLOWED = 50  # packets that may fail on the way to one frame


class CannotSeek(Exception):
    """The file isn't what its index says, or a frame doesn't come out: decode it from the beginning."""


def seek_frames(
    path: Path, wanted: Sequence[int], index: PacketIndex
) -> Iterator[tuple[int, np.ndarray, float, bool]]:
    """Yield (frame, RGB uint8 (H,W,3), seconds, damaged) for every wanted frame, ascending. Raises CannotSeek; what came before it was right."""
    with open_container(path) as (container, stream):
        reader = _Seeker(container, stream, index, path)
        for group, frames in groupby(sorted(set(wanted)), index.group_of):
            yield from reader.read(group, list(frames))


def is_worthwhile(index: PacketIndex, wanted: Sequence[int]) -> bool:
    """Whether seeking to these frames is much less work than decoding everything before the last."""
    cost = packets_to_decode(index, wanted) * (SKIPPED if index.codec in SKIPPABLE else 1.0)
    return max(wanted) >= FEW and cost < WORTH_SEEKING * max(wanted)


def packets_to_decode(index: PacketIndex, wanted: Sequence[int]) -> int:
    """How many packets seeking has to go through, to compare with max(wanted) of a sequential decode."""
    last: dict[int, int] = {}
    for frame in wanted:
        group = index.group_of(frame)
        last[group] = max(last.get(group, 0), frame - int(index.starts[group]) + 1)
    return sum(last.values())


class _Seeker:
    """One open file. position: of the next packet, in decoding order; None when it isn't known."""

    def __init__(self, container: Any, stream: Any, index: PacketIndex, path: Path):
        self.container, self.stream, self.index, self.path = container, stream, index, path
        self.packets: Iterator[Any] | None = None
        self.waiting: list[Any] = []
        self.position: int | None = None
        self.decoding = False  # whether the decoder has seen every packet from a key frame up to `position`
        self.entry: int | None = None  # when the frame is shown at which decoding began, until it comes out
        self.skips = stream.codec_context.name in SKIPPABLE
        self.groups = {int(name): i for i, name in enumerate(index.names)}

    def read(self, group: int, frames: list[int]) -> Iterator[tuple[int, np.ndarray, float, bool]]:
        """The wanted frames of one group."""
        shown = self._times_of(group)
        order = np.sort(shown)
        try:
            missing = {int(order[frame - int(self.index.starts[group])]): frame for frame in frames}
        except IndexError:
            raise CannotSeek from None
        leading = bool(
            group and len(shown) and min(missing) < shown[0]
        )  # shown before its key frame: refers to the group before
        damaged_once: dict[int, tuple[np.ndarray, float]] = {}
        for step in STEPS_BACK:
            begin = max(group - step - leading, 0)
            for pts, image, damaged in self._decode(begin, group, set(missing)):
                seconds = max((pts - self.index.origin) * self.index.time_base, 0.0)
                if damaged:
                    damaged_once[missing[pts]] = (image, seconds)
                    continue
                frame = missing.pop(pts)
                damaged_once.pop(frame, None)
                yield frame, image, seconds, False
            if not missing or begin == 0:
                break
        for frame in sorted(missing.values()):
            if frame not in damaged_once:
                raise CannotSeek
            yield frame, *damaged_once[frame], True

    def _times_of(self, group: int) -> np.ndarray:
        """Presentation times of a group's frames, in decoding order."""
        key, length = int(self.index.keys[group]), self.index.length(group)
        if self.index.pts is not None and self.index.shown is not None:
            times: np.ndarray = self.index.pts[key : key + length][self.index.shown[key : key + length]]
            return times
        self._go_to(group)
        found = []
        for _ in range(length):
            packet = self._next_packet()
            if packet is None or packet.pts is None:
                raise CannotSeek
            if not packet.is_discard:
                found.append(packet.pts)
        following = self._next_packet()
        if len(set(found)) != len(found) or (following is not None and not following.is_keyframe):
            raise CannotSeek
        self.position = None  # decoding starts again at the key frame
        return np.array(found, np.int64)

    def _decode(self, begin: int, group: int, wanted: set[int]) -> Iterator[tuple[int, np.ndarray, bool]]:
        """(presentation time, RGB, damaged) of wanted frames, decoding from the key frame of group `begin`; ends when all came or can't come."""
        import av

        start = int(self.index.keys[begin])
        end = int(self.index.keys[group]) + self.index.length(group) + 64  # a decoder holds frames back
        if (
            self.position is None
            or not start <= self.position <= int(self.index.keys[group])
            or not self.decoding
        ):
            self._go_to(begin)
            self.decoding = True
        from av.video.frame import PictureType

        errors, context = 0, self.stream.codec_context
        while wanted:
            packet = self._next_packet() if self.position is not None and self.position < end else None
            if self.skips:
                context.skip_frame = "DEFAULT" if packet is None or packet.pts in wanted else "NONREF"
            try:
                frames = context.decode(packet)
            except av.error.EOFError:
                frames = []
            except av.error.FFmpegError:
                frames, errors = [], errors + 1
            for frame in frames:
                if frame.pts == self.entry:
                    self.entry = None
                    if (
                        frame.pict_type != PictureType.I
                    ):  # a key packet that isn't one: the picture builds up over the following frames
                        raise CannotSeek
                if frame.pts in wanted:
                    if self.entry is not None and frame.pts > self.entry:
                        raise CannotSeek
                    check_size(frame.width, frame.height, str(self.path))
                    wanted.discard(frame.pts)
                    yield frame.pts, apply_rotation(frame), bool(frame.is_corrupt)
            if packet is None or errors > ERRORS_ALLOWED:
                self.position = None  # the decoder was drained
                return

    def _next_packet(self) -> Any:
        """The next packet that holds something; None at the end or at an error."""
        import av

        try:
            packet = (
                self.waiting.pop()
                if self.waiting
                else next(p for p in self.packets or () if p.size or p.dts is None)
            )
        except (av.error.FFmpegError, StopIteration):
            return None
        if not packet.size:
            return None
        if self.position is not None:
            self.position += 1
        return packet

    def _go_to(self, group: int) -> None:
        """Place the reader before a group's key frame; wherever the container lands, the packet itself tells. Raises CannotSeek."""
        import av

        self.decoding = False
        for target in dict.fromkeys(max(group - back, 0) for back in (0, 1, 2, 4, 16, 64)):
            try:
                self.container.seek(int(self.index.names[target]), stream=self.stream, backward=True)
            except av.error.FFmpegError:
                continue
            self.packets, self.waiting, self.position = self.container.demux(self.stream), [], None
            while (packet := self._next_packet()) is not None and not packet.is_keyframe:
                pass
            if packet is None:
                continue
            found = self.groups.get(packet.dts if self.index.from_table else packet.pts)
            if found is None or found > group:
                continue
            self.waiting, self.position = [packet], int(self.index.keys[found])
            while self.position < int(self.index.keys[group]):
                if self._next_packet() is None:
                    break
            else:
                self._remember_entry()
                return
        raise CannotSeek

    def _remember_entry(self) -> None:
        packet = self._next_packet()
        if packet is None or packet.pts is None:
            raise CannotSeek
        self.waiting, self.position, self.entry = [packet], (self.position or 1) - 1, packet.pts
