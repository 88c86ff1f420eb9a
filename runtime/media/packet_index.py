"""Where a video file's frames are, without decoding: which packet starts a group of pictures, and in which order frames are shown.

Frames are numbered as a full decode gives them: by presentation time. Packets come in decoding order. A group of pictures (GOP) begins with a
key frame; whatever precedes a key frame in the file is also shown before the rest of its group, so frame i lies in the group that holds packet
i. Two sources: the container's own table (MP4 and MOV: nothing but the header is read), else one pass over the packets.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.container import FALLBACK_FPS, open_container

TABLES = {"mov", "mp4"}  # containers whose table lists every packet, with decoding times
MAX_PACKETS = 50_000_000  # 230 hours at 60 frames a second; more is a damaged file


@dataclass
class PacketIndex:
    """count: frames in the file; promised: how many it says it has. fps: their rate. origin: presentation time of the first, in units of
    time_base (seconds). broken: reading ended early or in an error.

    keys: positions (in decoding order, discarded packets counted) of key frames; starts: frames shown before each; names: what each is sought by
    and told by when it comes (a decoding time from a table, a presentation time from a pass). pts: presentation times in decoding order, None
    where only the table was read. shown: False for packets that an edit list discards. seekable: frames can be found by time. codec: FFmpeg's name.
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
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    starts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    names: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    pts: np.ndarray | None = None
    shown: np.ndarray | None = None

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.count / self.fps

    def group_of(self, frame: int) -> int:
        """The group of pictures that holds a frame."""
        return int(np.searchsorted(self.starts, frame, side="right")) - 1

    def length(self, group: int) -> int:
        """Packets of a group."""
        return int((self.keys[group + 1] if group + 1 < len(self.keys) else self.packets) - self.keys[group])


def index_packets(path: Path, table: bool = True) -> PacketIndex:
    """The index of a file's first video stream. table: trust the container's, where it has one.

    Raises MediaError for a file without a single frame.
    """
    with open_container(path) as (container, stream):
        if table and set(container.format.name.split(",")) & TABLES:
            found = _from_table(container, stream, path)
            if found is not None:
                return found
    with open_container(path) as (container, stream):
        return _from_packets(container, stream, path)


def _from_table(container: Any, stream: Any, path: Path) -> PacketIndex | None:
    """What the header says, or None if that can't be all: fragments (their table grows as they are read), one that reaches beyond the file's end."""
    entries, promised = stream.index_entries, int(stream.frames or 0)
    packets, rate, size = len(entries), float(stream.average_rate or 0), path.stat().st_size
    if not 0 < packets <= MAX_PACKETS or packets != promised or not 0.001 < rate < 100000:
        return None
    keys, starts, names, count = array("q"), array("q"), array("q"), 0
    for position, entry in enumerate(entries):
        if entry.pos < 0 or entry.pos + entry.size > size or entry.size < 1:
            return None
        if entry.is_keyframe:
            keys.append(position)
            starts.append(count)
            names.append(entry.timestamp)
        count += not entry.is_discard
    if not count or not keys or keys[0] != 0:
        return None
    first = [
        p.pts
        for p in _group_packets(container, stream, int(keys[1]) if len(keys) > 1 else packets)
        if p.pts is not None and not p.is_discard
    ]
    if not first:
        return None
    return PacketIndex(
        count,
        count,
        rate,
        min(first),
        float(stream.time_base),
        seekable=_climb(names),
        from_table=True,
        codec=stream.codec_context.name,
        packets=packets,
        keys=np.array(keys),
        starts=np.array(starts),
        names=np.array(names),
    )


def _climb(values: Any) -> bool:
    """Whether every value is above the one before."""
    return bool((np.diff(np.asarray(values, np.int64)) > 0).all())


def _group_packets(container: Any, stream: Any, count: int) -> Iterator[Any]:
    """The next `count` packets that hold something; FFmpeg's errors end them."""
    import av

    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
                count -= 1
            if not count:
                return
    except av.error.FFmpegError:
        return


def _from_packets(container: Any, stream: Any, path: Path) -> PacketIndex:
    """One pass over the packets: nothing is decoded."""
    import av

    pts, shown, keys, broken, timeless = array("q"), array("b"), array("q"), False, False
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_keyframe:
                keys.append(len(pts))
            timeless = timeless or packet.pts is None
            pts.append(packet.pts if packet.pts is not None else 0)
            shown.append(not packet.is_discard)
            broken = broken or packet.is_corrupt
            if len(pts) > MAX_PACKETS:
                raise MediaError(f"{path} has more than {MAX_PACKETS} packets; it is damaged")
    except av.error.FFmpegError:
        broken = True
    times, visible, first = np.array(pts, np.int64), np.array(shown, bool), np.array(keys, np.int64)
    count, base, promised = int(visible.sum()), float(stream.time_base or 0), int(stream.frames or 0)
    if count == 0:
        raise MediaError(f"{path} has a video stream without a single frame")
    seen, fps = times[visible], float(stream.average_rate or 0)
    if not 0.001 < fps < 100000:
        span = float(seen.max() - seen.min()) * base if not timeless else 0.0
        fps = (count - 1) / span if span else FALLBACK_FPS
    origin = int(seen.min()) if not timeless else 0
    found = PacketIndex(
        count,
        max(count, promised),
        fps,
        origin,
        base,
        broken or count < promised,
        codec=stream.codec_context.name,
        packets=len(times),
        keys=first,
        starts=np.concatenate([[0], np.cumsum(visible)])[first],
        pts=times,
        shown=visible,
    )
    if not timeless and len(first) and first[0] == 0 and base:
        found.names, found.seekable = times[first], _in_groups(times, first)
    return found


def _in_groups(times: np.ndarray, keys: np.ndarray) -> bool:
    """Whether no two frames are shown at once, and every group is shown after the one before it: what finding frames by time needs."""
    if (np.diff(np.sort(times)) <= 0).any():
        return False
    highest, lowest = np.maximum.reduceat(times, keys), np.minimum.reduceat(times, keys)
    return bool((highest[:-1] < lowest[1:]).all())
