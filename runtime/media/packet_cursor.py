"""Walk through a file's packets and know each one's position in the packet index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ppllava_edge.runtime.media.container import read_packets
from ppllava_edge.runtime.media.limits import Budget
from ppllava_edge.runtime.media.packet_index import PacketIndex

SEEK_BACK = (0, 1, 2, 4, 16, 64)  # groups before the wanted one to seek to, in this order, until one works


class CannotSeek(Exception):
    """The file differs from its index, or a frame can't be decoded: decode the file from the beginning."""


class PacketCursor:
    """A read position in an open file.

    Args:
        container: The open PyAV container.
        stream: Its video stream.
        index: The file's packet index.
        budget: What reading the file may cost.

    Attributes:
        position: The next packet's position in decoding order; None if it isn't known.
    """

    def __init__(self, container: Any, stream: Any, index: PacketIndex, budget: Budget):
        self.position: int | None = None
        self._container = container
        self._stream = stream
        self._index = index
        self._budget = budget
        self._packets: Iterator[Any] = iter(())
        self._peeked: Any = None
        self._group_at = {int(timestamp): i for i, timestamp in enumerate(index.key_timestamps)}

    def next(self) -> Any:
        """Take the next packet that holds data. Returns None at the end of the file or at an error."""
        packet = self.peek()
        self._peeked = None
        if packet is not None and self.position is not None:
            self.position += 1
        return packet

    def peek(self) -> Any:
        """Look at the next packet without taking it. Returns None at the end of the file or at an error."""
        import av

        if self._peeked is None:
            try:
                self._peeked = next((packet for packet in self._packets if packet.size), None)
            except av.error.FFmpegError:
                return None
        return self._peeked

    def go_to(self, group: int) -> None:
        """Move to a group's key packet.

        Containers seek only roughly. So the timestamp of the first key packet after a seek tells which
        group the cursor is in. If that is unknown or too late, earlier groups are tried; if it is too
        early, packets are skipped.

        Raises:
            CannotSeek: If the group can't be reached.
        """
        for target in dict.fromkeys(max(group - back, 0) for back in SEEK_BACK):
            reached = self._seek(target)
            if reached is not None and reached <= group and self._skip_to(group):
                return
        raise CannotSeek

    def _seek(self, target: int) -> int | None:
        """Seek to a group's timestamp. Returns the group the cursor is at now; None if that is unknown."""
        import av

        self.position = None
        timestamp = int(self._index.key_timestamps[target])
        try:
            self._container.seek(timestamp, stream=self._stream, backward=True)
        except av.error.FFmpegError:
            return None
        self._packets = read_packets(self._container, self._stream, self._budget)
        self._peeked = None
        while (packet := self.peek()) is not None and not packet.is_keyframe:
            self.next()
        if packet is None:
            return None
        group = self._group_at.get(packet.dts if self._index.from_table else packet.pts)
        if group is not None:
            self.position = int(self._index.key_positions[group])
        return group

    def _skip_to(self, group: int) -> bool:
        """Skip packets up to a group's key packet. Returns whether there were enough."""
        end = int(self._index.key_positions[group])
        while self.position is not None and self.position < end:
            if self.next() is None:
                return False
        return True
