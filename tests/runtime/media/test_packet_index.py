"""The packet index: a container's table and its packets agree; incomplete tables are not used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.encoded_clips import COUNT, Clips, encode_clip, full_decode
from ppllava_edge.runtime.media.packet_index import index_packets


@pytest.mark.parametrize("kind", ["h264 with B-frames", "h264 in open groups", "hevc in open groups", "av1"])
def test_the_table_of_an_mp4_agrees_with_its_packets(kind: str, clips: Clips) -> None:
    path = clips.path(kind)
    table, packets = index_packets(path), index_packets(path, table=False)
    assert table.from_table and not packets.from_table
    assert table.seekable and packets.seekable
    assert (table.count, table.origin, table.fps) == (packets.count, packets.origin, packets.fps)
    np.testing.assert_array_equal(table.key_positions, packets.key_positions)
    np.testing.assert_array_equal(table.group_starts, packets.group_starts)


@pytest.mark.parametrize("flags", ["frag_keyframe", "frag_keyframe+empty_moov", "dash", "faststart"])
def test_all_frames_of_fragmented_files_are_counted(flags: str, tmp_path: Path) -> None:
    """Their table holds only the fragments read so far."""
    options = {"g": "24", "bf": "2"}
    path = encode_clip(tmp_path / "fragments.mp4", "libx264", options, {"movflags": flags})
    index = index_packets(path)
    assert index.count == index.promised == COUNT == len(full_decode(path))
    assert index.from_table == (flags == "faststart")


def test_every_frame_is_in_its_group_of_pictures(clips: Clips) -> None:
    index = index_packets(clips.path("h264 with B-frames"))
    groups = [index.group_of(frame) for frame in range(index.count)]
    assert groups == sorted(groups) and set(groups) == set(range(len(index.key_positions)))
    packets = [position for group in set(groups) for position in index.group_packets(group)]
    assert sorted(packets) == list(range(index.packets))
