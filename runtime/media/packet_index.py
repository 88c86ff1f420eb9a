"""Where a video file's frames are, found without decoding any.

A packet is one compressed frame. The file stores packets in decoding order; a B-frame is decoded after
frames that are shown later, so frames are shown in another order. Frames are numbered in the order they are
shown, from 0, as a full decode gives them.

A group of pictures (GOP) begins with a key frame, which refers to no other, and ends before the next one.
All packets before a key frame in the file belong to earlier groups, and whole groups are shown one after
another. So the group that holds the i-th shown packet also holds frame i, and knowing the key packets is
enough to find a frame's group.

The index comes from the container's own table (MP4 and MOV: only the header is read) or from one pass over
all packets.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.container import FALLBACK_FPS, open_container, read_packets
from ppllava_edge.runtime.media.limits import Budget
from ppllava_edge.runtime.media.opening.paths import display_name

CONTAINERS_WITH_TABLE = {"mov", "mp4"}  # their header lists every packet, with decoding times
MIN_FPS = 0.001  # header values outside these limits are wrong
MAX_FPS = 100_000
SLOWEST_FPS = 1e-6  # from timestamps: a frame in 11 days; less means that the timestamps are wrong
CHECK_EVERY = 256  # table entries between two looks at the clock


def _no_numbers() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass
class PacketIndex:
    """The groups of pictures of a file's video stream.

    Attributes:
        count: Frames in the file.
        promised: Frames that the file's header announces, or `count` if that is more.
        fps: Frames per second, on average.
        origin: Presentation time of the first frame, in units of time_base.
        time_base: The unit of timestamps, in seconds.
        broken: Reading ended early or met an error.
        seekable: Frames can be found by time.
        from_table: Built from the container's table, without reading packets.
        codec: FFmpeg's name of the codec.
        packets: Packets in the file.
        key_positions: (G,) int64, each group's key packet: its position in decoding order. Packets that an
            edit list discards count, too.
        group_starts: (G,) int64, the number of each group's first frame.
        key_timestamps: (G,) int64, timestamps used to seek to key packets and to recognise them: decoding
            times if from_table, else presentation times.
        pts: (packets,) int64 presentation times in decoding order; None if from_table.
        shown: (packets,) bool, False for packets that an edit list discards; None if from_table.
    """

    count: int
    promised: int
    fps: float
    origin: int
    time_base: float
    broken: bool = False
    seekable: bool = False
    from_table: bool = False
    codec: str = ""
    packets: int = 0
    key_positions: np.ndarray = field(default_factory=_no_numbers)
    group_starts: np.ndarray = field(default_factory=_no_numbers)
    key_timestamps: np.ndarray = field(default_factory=_no_numbers)
    pts: np.ndarray | None = None
    shown: np.ndarray | None = None

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.count / self.fps

    def group_of(self, frame: int) -> int:
        """Return the group that holds a frame."""
        return int(np.searchsorted(self.group_starts, frame, side="right")) - 1

    def group_packets(self, group: int) -> range:
        """Return the positions of a group's packets, in decoding order."""
        is_last = group + 1 == len(self.key_positions)
        end = self.packets if is_last else self.key_positions[group + 1]
        return range(int(self.key_positions[group]), int(end))


def index_packets(path: Path, budget: Budget | None = None, table: bool = True) -> PacketIndex:
    """Index a file's first video stream.

    Args:
        path: The file.
        budget: What reading the file may cost; None: the default limits.
        table: Use the container's table, if it has a plausible one.

    Raises:
        MediaError: If the file can't be opened or holds no frame.
    """
    budget = budget or Budget(display_name(path))
    with open_container(path, budget) as (container, stream):
        if table and set(container.format.name.split(",")) & CONTAINERS_WITH_TABLE:
            index = _index_from_table(container, stream, budget)
            if index is not None:
                return index
    with open_container(path, budget) as (container, stream):  # reopened: checking the table consumed packets
        return _index_from_packets(container, stream, budget)


# -- from the container's table --------------------------------------------------------------------------


@dataclass
class _KeyPackets:
    """The key packets of a table: columns of a PacketIndex, and how many frames are shown in all."""

    positions: array
    group_starts: array
    timestamps: array
    frames: int


def _index_from_table(container: Any, stream: Any, budget: Budget) -> PacketIndex | None:
    """Read the header's table. None if it can't be complete: fragmented files extend it as they are read."""
    entries = stream.index_entries
    packets = len(entries)
    fps = float(stream.average_rate or 0)
    if packets > budget.limits.max_packets:
        raise _too_many_packets(budget)
    if packets < 1 or packets != int(stream.frames or 0) or not MIN_FPS < fps < MAX_FPS:
        return None
    keys = _key_packets(entries, container.size, budget)
    if keys is None:
        return None
    first_group = keys.positions[1] if len(keys.positions) > 1 else packets
    first_times = [
        packet.pts
        for packet in islice(_readable_packets(container, stream, budget), first_group)
        if packet.pts is not None and not packet.is_discard
    ]
    if not first_times:
        return None
    return PacketIndex(
        count=keys.frames,
        promised=keys.frames,
        fps=fps,
        origin=min(first_times),
        time_base=float(stream.time_base),
        seekable=bool((np.diff(np.array(keys.timestamps)) > 0).all()),
        from_table=True,
        codec=stream.codec_context.name,
        packets=packets,
        key_positions=np.array(keys.positions),
        group_starts=np.array(keys.group_starts),
        key_timestamps=np.array(keys.timestamps),
    )


def _too_many_packets(budget: Budget) -> MediaError:
    return MediaError(
        f"{budget.what} has more than {budget.limits.max_packets} compressed frames; if it isn't damaged, "
        "cut out a part, or raise the limit max_packets"
    )


def _key_packets(entries: Any, file_size: int, budget: Budget) -> _KeyPackets | None:
    """Collect a table's key packets. None if an entry is outside the file or the first isn't a key frame."""
    keys = _KeyPackets(array("q"), array("q"), array("q"), 0)
    for position, entry in enumerate(entries):
        if position % CHECK_EVERY == 0:
            budget.check()
        if entry.pos < 0 or entry.pos + entry.size > file_size or entry.size < 1:
            return None
        if entry.is_keyframe:
            keys.positions.append(position)
            keys.group_starts.append(keys.frames)
            keys.timestamps.append(entry.timestamp)
        keys.frames += not entry.is_discard
    if not keys.frames or not keys.positions or keys.positions[0] != 0:
        return None
    return keys


def _readable_packets(container: Any, stream: Any, budget: Budget) -> Iterator[Any]:
    """Yield packets that hold data, up to the first that FFmpeg can't read."""
    import av

    try:
        yield from (packet for packet in read_packets(container, stream, budget) if packet.size)
    except av.error.FFmpegError:
        return


# -- from the packets ------------------------------------------------------------------------------------


@dataclass
class _PacketList:
    """All packets of a stream, in decoding order.

    Attributes:
        pts: Presentation times; 0 where there is none.
        shown: 0 for packets that an edit list discards.
        keys: Positions of key packets.
        timeless: A packet has no presentation time.
        broken: A packet is damaged, or reading ended in an error.
    """

    pts: array = field(default_factory=lambda: array("q"))
    shown: array = field(default_factory=lambda: array("b"))
    keys: array = field(default_factory=lambda: array("q"))
    timeless: bool = False
    broken: bool = False


def _list_packets(container: Any, stream: Any, budget: Budget) -> _PacketList:
    """Read the whole file without decoding anything."""
    import av

    read = _PacketList()
    try:
        for packet in read_packets(container, stream, budget):
            if not packet.size:
                continue
            if packet.is_keyframe:
                read.keys.append(len(read.pts))
            read.timeless = read.timeless or packet.pts is None
            read.pts.append(packet.pts if packet.pts is not None else 0)
            read.shown.append(not packet.is_discard)
            read.broken = read.broken or packet.is_corrupt
            if len(read.pts) > budget.limits.max_packets:
                raise _too_many_packets(budget)
    except av.error.FFmpegError:
        read.broken = True
    return read


def _index_from_packets(container: Any, stream: Any, budget: Budget) -> PacketIndex:
    """Build the index from one pass over the packets."""
    read = _list_packets(container, stream, budget)
    pts = np.asarray(read.pts, np.int64)
    shown = np.asarray(read.shown, np.int8).view(bool)
    keys = np.asarray(read.keys, np.int64)
    count = int(shown.sum())
    promised = int(stream.frames or 0)
    time_base = float(stream.time_base or 0)
    if count == 0:
        raise MediaError(f"{budget.what} has a video stream without a single frame")
    shown_pts = pts[shown]
    fps = float(stream.average_rate or 0)
    if not MIN_FPS < fps < MAX_FPS:
        # Python's integers: the difference of two timestamps can exceed 64 bits.
        span = 0.0 if read.timeless else (int(shown_pts.max()) - int(shown_pts.min())) * time_base
        fps = (count - 1) / span if span > 0 else FALLBACK_FPS
        fps = fps if SLOWEST_FPS <= fps < MAX_FPS else FALLBACK_FPS
    index = PacketIndex(
        count=count,
        promised=max(count, promised),
        fps=fps,
        origin=0 if read.timeless else int(shown_pts.min()),
        time_base=time_base,
        broken=read.broken or count < promised,
        codec=stream.codec_context.name,
        packets=len(pts),
        key_positions=keys,
        group_starts=np.concatenate([[0], np.cumsum(shown)])[keys],
        pts=pts,
        shown=shown,
    )
    if not read.timeless and len(keys) and keys[0] == 0 and time_base:
        index.key_timestamps = pts[keys]
        index.seekable = _is_in_order(pts, keys)
    return index


def _is_in_order(pts: np.ndarray, keys: np.ndarray) -> bool:
    """Whether timestamps identify frames: all differ, and every group is shown after the one before it."""
    if (np.diff(np.sort(pts)) <= 0).any():
        return False
    latest, earliest = np.maximum.reduceat(pts, keys), np.minimum.reduceat(pts, keys)
    return bool((latest[:-1] < earliest[1:]).all())
