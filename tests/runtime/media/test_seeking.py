"""Frames found by seeking equal those of a full decode, for any codec, container and fault in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.encoded_clips import COUNT, KINDS, Clips, encode_clip, full_decode, remux
from ppllava_edge.runtime.media import readers, seeking
from ppllava_edge.runtime.media.packet_index import index_packets
from ppllava_edge.runtime.media.readers import VideoReader

SEEKABLE = [
    "h264 with B-frames",
    "h264 in open groups",
    "hevc in open groups",
    "h264 in a transport stream",
    "vp9",
    "av1",
    "mpeg-4 in mp4",
]


def read_frames(path: Path, numbers: list[int]) -> dict[int, np.ndarray]:
    """Frame number → image."""
    return {frame.number: frame.image for frame in VideoReader(path).frames(lambda reader: numbers)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_found_by_seeking_is_that_of_a_full_decode(
    kind: str, clips: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = clips.path(kind), clips.frames(kind)
    monkeypatch.setattr(readers, "is_worthwhile", lambda index, wanted: True)
    rng = np.random.default_rng(0)
    choices = [[int(i)] for i in rng.choice(len(whole), 24, replace=False)]
    choices += [sorted(rng.choice(len(whole), 8, replace=False).tolist()), [0], [len(whole) - 1]]
    for numbers in choices:
        found = read_frames(path, numbers)
        assert sorted(found) == numbers
        for i in numbers:
            np.testing.assert_array_equal(found[i], whole[i], err_msg=f"frame {i} of {numbers}")


@pytest.mark.parametrize("kind", SEEKABLE)
def test_seekable_clips_need_no_sequential_decode(
    kind: str, clips: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the test above would pass for a reader that never seeks."""
    reader = VideoReader(clips.path(kind))
    monkeypatch.setattr(reader, "_decode", lambda wanted: pytest.fail("decoded from the beginning"))
    numbers = [60, 100, 101, 140]
    assert reader.index.seekable
    assert [frame.number for frame in reader.frames(lambda r: numbers)] == numbers


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_a_variable_frame_rate(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    times = [0]
    for _ in range(COUNT - 1):
        times.append(times[-1] + int(rng.choice([20, 40, 500])))
    path = encode_clip(tmp_path / f"vfr.{suffix}", "libx264", {"bf": "3", "g": "24"}, times=times)
    whole = full_decode(path)
    for frame in VideoReader(path).frames(lambda reader: [30, 77, 78, 131]):
        np.testing.assert_array_equal(frame.image, whole[frame.number])
        assert frame.seconds == pytest.approx(times[frame.number] / 1000, abs=0.005)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, COUNT - 1), min_size=1, max_size=12))
def test_any_choice_of_frames(clips: Clips, numbers: set[int]) -> None:
    path, whole = clips.path("h264 in open groups"), clips.frames("h264 in open groups")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "is_worthwhile", lambda index, wanted: True)
        found = read_frames(path, sorted(numbers))
    assert set(found) == numbers
    for i in numbers:
        np.testing.assert_array_equal(found[i], whole[i])


def test_frames_that_no_other_refers_to_are_skipped(clips: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the frames between a key frame and the wanted one aren't decoded; the image is the same."""
    path, whole = clips.path("h264 with B-frames"), clips.frames("h264 with B-frames")
    monkeypatch.setattr(seeking, "SKIPPABLE", set())
    unskipped = read_frames(path, [140])[140]
    monkeypatch.undo()
    np.testing.assert_array_equal(read_frames(path, [140])[140], unskipped)
    np.testing.assert_array_equal(unskipped, whole[140])


# -- faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["times start again", "two at once", "a jump of an hour", "the key frame is missing"]
)
def test_broken_timestamps(fault: str, clips: Clips, tmp_path: Path) -> None:
    """Whatever the timestamps are, the frames are those of a full decode."""
    durations: list[int] = []

    def change(i: int, packet: Any) -> bool:
        durations.append(packet.duration or 40)
        if fault == "the key frame is missing":
            return i != 72
        if i >= 72 and fault == "a jump of an hour":
            packet.pts, packet.dts = packet.pts + 90000 * 3600, packet.dts + 90000 * 3600
        if i == 75 and fault == "two at once":
            packet.pts -= packet.duration or 1
        if i >= 72 and fault == "times start again":
            packet.pts, packet.dts = packet.pts - 72 * durations[0], packet.dts - 72 * durations[0]
        return True

    source, path = clips.path("h264 in a transport stream"), tmp_path / "broken.ts"
    try:
        remux(source, path, change)
    except av.error.FFmpegError:
        # The muxer refuses decreasing times: join two files instead, as broken recorders do.
        path.write_bytes(source.read_bytes() * 2)
    whole = full_decode(path)
    numbers = sorted({10, len(whole) // 2, len(whole) - 5})
    found = read_frames(path, numbers)
    for i, image in found.items():
        np.testing.assert_array_equal(image, whole[i], err_msg=f"frame {i}")
    assert len(found) == len(numbers)


def test_a_file_without_its_index(tmp_path: Path, clips: Clips) -> None:
    """A Matroska file that lost its end, with the cues."""
    data = clips.path("h264 in open groups, mkv").read_bytes()
    path = tmp_path / "no-cues.mkv"
    path.write_bytes(data[: data.rindex(b"\x1c\x53\xbb\x6b")])
    whole = full_decode(path)
    for i, image in read_frames(path, [50, 90, 120]).items():
        np.testing.assert_array_equal(image, whole[i])


@pytest.mark.parametrize("fault", ["groups begin elsewhere", "times of another file"])
def test_a_wrong_table_is_detected(fault: str, clips: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = clips.path("h264 with B-frames"), clips.frames("h264 with B-frames")
    wrong = index_packets(path)
    if fault == "groups begin elsewhere":
        shift = np.arange(len(wrong.key_positions)) > 2
        wrong.key_positions = wrong.key_positions + shift
        wrong.group_starts = wrong.group_starts + shift
    else:
        wrong.key_timestamps = wrong.key_timestamps + 7
    monkeypatch.setattr(
        readers,
        "index_packets",
        lambda path, budget, table=True: wrong if table else index_packets(path, budget, table=False),
    )
    found = read_frames(path, [20, 90, 140])
    assert wrong.from_table and sorted(found) == [20, 90, 140]
    for i, image in found.items():
        np.testing.assert_array_equal(image, whole[i])
