"""Damaged and wrong files give the decodable frames and a note, or one clear error line."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.commands import frame_number
from helpers.encoded_clips import COUNT, encode_clip
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.writing import write_video
from ppllava_edge.runtime.vision.frame_choice import read_frames, sample_indices

MAGIC_NUMBERS = [
    b"",
    b"RIFF\x10\0\0\0AVI LIST",
    b"\x1aE\xdf\xa3",
    b"GIF89a",
    b"\x89PNG\r\n\x1a\n",
    b"\0\0\0\x18ftypmp42",
]


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "words.mp4").write_text("this is not a video, whatever its name says\n" * 50)
    (tmp_path / "zeros.mp4").write_bytes(bytes(5000))
    for name, words in (
        ("missing.mp4", "no such file"),
        ("empty.mp4", "0 bytes"),
        ("words.mp4", "not a video"),
        ("zeros.mp4", "not a video"),
    ):
        with pytest.raises(MediaError, match=words):
            read_frames(tmp_path / name, 4)


def test_sound_without_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.m4a"
    with av.open(str(path), "w", format="ipod") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        for packet in [*stream.encode(sound), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(MediaError, match="only sound"):
        read_frames(path, 4)


def test_a_video_of_huge_frames(tmp_path: Path) -> None:
    """The header states the size; the file is refused before a frame is decoded."""
    path = tmp_path / "huge.y4m"
    path.write_bytes(b"YUV4MPEG2 W16000 H16000 F25:1 Ip C420jpeg\nFRAME\n" + bytes(10000))
    with pytest.raises(MediaError, match="too large"):
        read_frames(path, 2)


def test_a_tiny_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "tiny.avi", np.zeros((3, 2, 2, 3), np.uint8), codec="mpeg4", options={})
    with pytest.raises(MediaError, match="too small"):
        read_frames(path, 2)


@pytest.mark.parametrize("share", [0.4, 0.7, 0.9])
def test_a_truncated_video_gives_the_frames_it_holds(
    tmp_path: Path, moving_frames: np.ndarray, share: float
) -> None:
    path = write_video(
        tmp_path / "whole.mkv", np.concatenate([moving_frames] * 4), fps=12, options={"crf": "10", "g": "12"}
    )
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    found = read_frames(path, 6)
    assert found.count < 96 and len(found.images) == 6
    assert [frame_number(image) for image in found.images] == [i % 24 for i in found.indices]


def test_joined_transport_streams_give_the_first_one(tmp_path: Path) -> None:
    """The second file adds a second stream, which PyAV can't handle."""
    options = {"g": "24", "bf": "2"}
    other_stream = {"mpegts_start_pid": "0x200", "mpegts_pmt_start_pid": "0x1100"}
    first = encode_clip(tmp_path / "first.ts", "libx264", options)
    second = encode_clip(tmp_path / "second.ts", "libx264", options, other_stream)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    found = read_frames(joined, 6)
    assert found.notes and "damaged" in found.notes[0]
    assert found.indices == sample_indices(found.count, 25, 6) and found.count >= COUNT
    for image, expected in zip(found.images[:5], read_frames(first, 6).images):
        np.testing.assert_array_equal(image, expected)


def test_a_truncated_mp4_without_its_index(video_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    data = video_file.read_bytes()
    path.write_bytes(data[: data.index(b"moov")])  # the index is at the end
    with pytest.raises(MediaError, match="not a video that can be read"):
        read_frames(path, 4)


def test_a_truncated_mp4_with_its_index_in_front(tmp_path: Path, moving_frames: np.ndarray) -> None:
    path = encode_clip(
        tmp_path / "front.mp4",
        "libx264",
        {"crf": "10", "g": "6"},
        {"movflags": "faststart"},
        frames=moving_frames,
        fps=12,
    )
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.7)])
    found = read_frames(path, 6)
    assert found.notes and "truncated" in found.notes[0] and "could be decoded" in found.notes[0]
    assert found.indices[-1] < 23 and len(found.images) == 6


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bits_cause_at_most_one_clear_error(
    video_file: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(video_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 12))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "flipped.mp4"
    path.write_bytes(content)
    try:
        found = read_frames(path, 5)
    except MediaError as error:
        assert "\n" not in str(error)
    else:
        assert 1 <= len(found.images) <= 5 and all(image.dtype == np.uint8 for image in found.images)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(MAGIC_NUMBERS), st.binary(max_size=400))
def test_arbitrary_bytes_as_a_video(tmp_path: Path, magic: bytes, rest: bytes) -> None:
    path = tmp_path / "junk.bin"
    path.write_bytes(magic + rest)
    try:
        read_frames(path, 3)
    except MediaError as error:
        assert "\n" not in str(error)
