"""Decode chosen frames of a file without decoding all of it.

Video codecs store most frames as differences to other frames. A decoder therefore has to begin at a key
frame, which refers to no other, and decode every frame up to the wanted one. The index (packet_index.py)
says which group of pictures, i.e. which key frame, a frame belongs to. To decode frames of one group:

1. Find the presentation time of every frame in the group. Sorted, they give the time of the i-th frame
   shown, and decoded frames are recognised by their times.
2. Go to the group's key frame (packet_cursor.py) and decode until all wanted frames came out. If the
   cursor is shortly before the key frame, packets are read up to it instead of seeking.
3. In codecs that mark frames no other frame refers to (H.264, MPEG-2), skip those that aren't wanted.
4. If a frame comes out damaged, begin again one, two, then eight key frames earlier. Some encoders let
   frames refer back across a key frame: "open" groups begin with frames that are shown before their key
   frame and refer to the group before, and with "gradual refresh" there are no true key frames: the picture
   builds up over many frames.

The result is exactly what decoding the whole file gives. Whenever the file contradicts its index (wrong
times, missing packets, key packets that decode to no intra-coded picture), CannotSeek is raised and the
caller decodes sequentially.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.runtime.media.container import check_memory, open_container, to_rgb
from ppllava_edge.runtime.media.limits import Budget
from ppllava_edge.runtime.media.packet_cursor import CannotSeek, PacketCursor
from ppllava_edge.runtime.media.packet_index import PacketIndex

SKIPPABLE = {"h264", "mpeg2video"}  # codecs that mark frames which no other frame refers to
SKIPPING_COST = 0.6  # decoding time with such frames skipped, relative to decoding all
WORTHWHILE_COST = 0.7  # share of a sequential decode's cost; seeking must cost less
ALWAYS_SEQUENTIAL = 100  # frames; below this a sequential decode is fast enough
RETRY_GROUPS_BACK = (0, 1, 2, 8)  # groups before the frame's own to begin at, until it is undamaged
DECODER_DELAY = 64  # packets after a group that a decoder may need before it gives the group's last frame
MAX_ERRORS = 50  # packets that may fail on the way to a group's frames

SoughtFrame = tuple[int, np.ndarray, float, bool]  # number, RGB uint8 (H, W, 3), seconds, damaged


def seek_frames(
    path: Path, wanted: Sequence[int], index: PacketIndex, budget: Budget
) -> Iterator[SoughtFrame]:
    """Decode frames by seeking to the key frames before them.

    Args:
        path: The file.
        wanted: Frame numbers.
        index: The file's packet index; it must be seekable.
        budget: What reading the file may cost.

    Yields:
        Every wanted frame once, ascending: its number, RGB uint8 (H, W, 3), seconds, whether it is damaged.

    Raises:
        CannotSeek: If the file contradicts the index. The frames yielded before are right.
    """
    with open_container(path, budget) as (container, stream):
        decoder = _GroupDecoder(container, stream, index, budget)
        for group, frames in groupby(sorted(set(wanted)), index.group_of):
            yield from decoder.read(group, list(frames))


def is_worthwhile(index: PacketIndex, wanted: Sequence[int]) -> bool:
    """Whether seeking to these frames is much less work than decoding everything up to the last."""
    sequential_cost = max(wanted)
    cost = packets_to_decode(index, wanted) * (SKIPPING_COST if index.codec in SKIPPABLE else 1.0)
    return sequential_cost >= ALWAYS_SEQUENTIAL and cost < WORTHWHILE_COST * sequential_cost


def packets_to_decode(index: PacketIndex, wanted: Sequence[int]) -> int:
    """Count the packets that seeking decodes; a sequential decode takes about max(wanted)."""
    packets: dict[int, int] = {}  # group → packets from its key frame to its last wanted frame
    for frame in wanted:
        group = index.group_of(frame)
        packets[group] = max(packets.get(group, 0), frame - int(index.group_starts[group]) + 1)
    return sum(packets.values())


class _GroupDecoder:
    """Decodes frames of one group of pictures after another, from one open file.

    Invariant: if the cursor's position is known, the decoder has been fed every packet from a key frame up
    to there.

    Attributes:
        entry_pts: Presentation time of the key frame where decoding began, until that frame comes out.
    """

    def __init__(self, container: Any, stream: Any, index: PacketIndex, budget: Budget):
        self.budget = budget
        self.index = index
        self.cursor = PacketCursor(container, stream, index, budget)
        self.codec = stream.codec_context
        self.can_skip = self.codec.name in SKIPPABLE
        self.entry_pts: int | None = None

    def read(self, group: int, frames: list[int]) -> Iterator[SoughtFrame]:
        """Decode frames of one group, from earlier key frames if they come out damaged."""
        times = self._times_of(group)
        missing = self._frames_by_time(group, frames, times)
        # A frame shown before its key frame refers to the previous group.
        refers_back = group > 0 and len(times) > 0 and min(missing) < times[0]
        damaged_images: dict[int, np.ndarray] = {}  # by presentation time
        for groups_back in RETRY_GROUPS_BACK:
            begin = max(group - groups_back - int(refers_back), 0)
            for pts, image, damaged in self._decode(begin, group, set(missing)):
                if damaged:
                    damaged_images[pts] = image
                else:
                    yield missing.pop(pts), image, self._seconds(pts), False
            if not missing or begin == 0:
                break
        for pts in sorted(missing):
            if pts not in damaged_images:
                raise CannotSeek
            yield missing[pts], damaged_images[pts], self._seconds(pts), True

    def _seconds(self, pts: int) -> float:
        return max((pts - self.index.origin) * self.index.time_base, 0.0)

    # -- presentation times ------------------------------------------------------------------------------

    def _frames_by_time(self, group: int, frames: list[int], times: np.ndarray) -> dict[int, int]:
        """Map presentation times to frame numbers, for the wanted frames of a group."""
        in_order = np.sort(times)
        first = int(self.index.group_starts[group])
        try:
            return {int(in_order[frame - first]): frame for frame in frames}
        except IndexError:
            raise CannotSeek from None

    def _times_of(self, group: int) -> np.ndarray:
        """Presentation times of a group's frames, in decoding order: from the index if it has them."""
        packets = self.index.group_packets(group)
        if self.index.pts is None or self.index.shown is None:
            return self._read_times(group, len(packets))
        rows = slice(packets.start, packets.stop)
        times: np.ndarray = self.index.pts[rows][self.index.shown[rows]]
        return times

    def _read_times(self, group: int, packets: int) -> np.ndarray:
        """Read a group's packets for their presentation times, and check that the next group follows them."""
        self.cursor.go_to(group)
        times = []
        for _ in range(packets):
            packet = self.cursor.next()
            if packet is None or packet.pts is None:
                raise CannotSeek
            if not packet.is_discard:
                times.append(packet.pts)
        following = self.cursor.next()
        if len(set(times)) != len(times) or (following is not None and not following.is_keyframe):
            raise CannotSeek
        self.cursor.position = None  # the decoder received none of these packets
        return np.array(times, np.int64)

    # -- decoding ----------------------------------------------------------------------------------------

    def _decode(self, begin: int, group: int, wanted: set[int]) -> Iterator[tuple[int, np.ndarray, bool]]:
        """Decode from the key frame of group `begin` to the end of `group`, or to the last wanted frame.

        Yields:
            Presentation time, RGB uint8 (H, W, 3), whether the frame is damaged.
        """
        import av

        self._prepare(begin, group)
        end = self.index.group_packets(group).stop + DECODER_DELAY
        errors = 0
        while wanted:
            packet = self._next_before(end)
            if self.can_skip:
                self.codec.skip_frame = "DEFAULT" if packet is None or packet.pts in wanted else "NONREF"
            frames = []
            try:
                frames = self.codec.decode(packet)
            except av.error.EOFError:
                pass
            except av.error.FFmpegError as error:
                check_memory(error, self.budget.what)
                errors += 1
            for frame in frames:
                self._check_entry(frame, frame.pts in wanted)
                self.budget.add(frame.width, frame.height)
                if frame.pts in wanted:
                    wanted.discard(frame.pts)
                    yield frame.pts, to_rgb(frame, self.budget.what), bool(frame.is_corrupt)
            if packet is None or errors > MAX_ERRORS:
                self.cursor.position = None  # the decoder is drained: it needs a key frame to go on
                return

    def _prepare(self, begin: int, group: int) -> None:
        """Go to the key frame of group `begin`, unless the decoder is between it and that of `group`."""
        first, last = int(self.index.key_positions[begin]), int(self.index.key_positions[group])
        if self.cursor.position is not None and first <= self.cursor.position <= last:
            return
        self.cursor.go_to(begin)
        packet = self.cursor.peek()
        if packet is None or packet.pts is None:
            raise CannotSeek
        self.entry_pts = packet.pts

    def _next_before(self, end: int) -> Any:
        """The next packet; None, which drains the decoder, after position `end` or the last packet."""
        if self.cursor.position is None or self.cursor.position >= end:
            return None
        return self.cursor.next()

    def _check_entry(self, frame: Any, wanted: bool) -> None:
        """Raise CannotSeek if decoding didn't begin at a true key frame.

        With gradual refresh a "key" packet decodes to a picture that isn't intra-coded, or to none at all.
        """
        from av.video.frame import PictureType

        if frame.pts == self.entry_pts:
            self.entry_pts = None
            if frame.pict_type != PictureType.I:
                raise CannotSeek
        elif wanted and self.entry_pts is not None and frame.pts > self.entry_pts:
            raise CannotSeek
