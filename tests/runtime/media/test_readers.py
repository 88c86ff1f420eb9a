"""Decoding real encoded files: the right frames of good ones, one clear line or a note for bad ones."""

from __future__ import annotations

import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.commands import frame_number
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.writing import write_video
from ppllava_edge.runtime.vision.frame_choice import read_frames, sample_indices

CODECS = {
    "mp4": ("libx264", {"crf": "10", "bf": "3"}),
    "mkv": ("libx265", {"crf": "10", "x265-params": "log-level=none"}),
    "webm": (
        "libvpx-vp9",
        {"crf": "10", "b": "0", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "10"},
    ),
    "avi": ("mpeg4", {"qscale": "2"}),
    "mov": ("mjpeg", {"strict": "unofficial"}),
}


@pytest.mark.parametrize("suffix", CODECS)
def test_the_sampled_frames_are_the_right_ones(
    suffix: str, tmp_path: Path, moving_frames: np.ndarray
) -> None:
    codec, options = CODECS[suffix]
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec} encoder")
    path = tmp_path / f"clip.{suffix}"
    try:
        write_video(path, moving_frames, fps=12, codec=codec, options=options)
    except (av.error.FFmpegError, ValueError) as error:
        pytest.skip(f"this FFmpeg can't encode {codec} so: {error}")
    found = read_frames(path, 6)
    assert found.indices == sample_indices(24, 12.0, 6)
    assert [frame_number(image) for image in found.images] == found.indices
    assert found.times == pytest.approx([i / 12 for i in found.indices], abs=0.01)
    assert not found.notes and found.kind == "video" and found.images[0].shape == (96, 128, 3)


def test_a_range(video_file: Path) -> None:
    found = read_frames(video_file, 4, start=0.5, end=1.5)
    assert (
        found.indices == sample_indices(24, 12.0, 4, (0.5, 1.5))
        and found.indices[0] >= 6
        and found.indices[-1] <= 18
    )
    assert [frame_number(image) for image in found.images] == found.indices
    assert read_frames(video_file, 4, start=1.0).indices[0] >= 12
    for start, end in ((5, 9), (1.5, 0.5)):
        with pytest.raises(MediaError, match="no frames of"):
            read_frames(video_file, 4, start=start, end=end)
    with pytest.raises(MediaError, match="--start"):
        read_frames(video_file, 4, start=-1)


def test_a_short_video_repeats_frames(video_file: Path) -> None:
    found = read_frames(video_file, 60)
    assert len(found.images) == 60 and sorted(set(found.indices)) == list(range(24))


@pytest.mark.parametrize("frames", [0, -3, 10**6])
def test_impossible_frame_counts(video_file: Path, frames: int) -> None:
    with pytest.raises(MediaError, match="--frames"):
        read_frames(video_file, frames)


def test_variable_frame_rate(tmp_path: Path, moving_frames: np.ndarray) -> None:
    """Frames are counted, times are the file's own."""
    path, pts = tmp_path / "vfr.mkv", [0]
    for i in range(1, 24):
        pts.append(pts[-1] + (40 if i % 3 else 400))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(moving_frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    found = read_frames(path, 24)
    assert [frame_number(image) for image in found.images] == found.indices
    assert found.times == pytest.approx([pts[i] / 1000 for i in found.indices], abs=0.002)


def test_rotation_metadata(tmp_path: Path, moving_frames: np.ndarray) -> None:
    """A phone's portrait video: the frames are stored lying down and the container says how to turn them."""
    frames = moving_frames.copy()
    frames[:, :30, :40] = (20, 30, 220)  # blue, upper left as stored
    path = write_video(tmp_path / "turned.mp4", frames, fps=12, options={"crf": "10"})
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the display matrix of a version-0 track header
    one = 1 << 16
    data[at : at + 36] = struct.pack(
        ">9i", 0, one, 0, -one, 0, 0, 96 * one, 0, 1 << 30
    )  # a quarter turn clockwise
    path.write_bytes(data)
    image = read_frames(path, 1).images[0]
    assert image.shape == (128, 96, 3)
    blue = np.argwhere((image[..., 2] > 150) & (image[..., 0] < 90)).mean(0)
    assert blue[0] < 40 and blue[1] > 60, "upper left lies at the upper right after a turn clockwise"


# -- images ----------------------------------------------------------------------------------------------------------


def test_an_animated_gif(tmp_path: Path, moving_frames: np.ndarray) -> None:
    path = tmp_path / "moving.gif"
    pictures = [Image.fromarray(frame) for frame in moving_frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80, loop=0)
    found = read_frames(path, 6)
    assert found.kind == "video" and found.count == 24
    assert [frame_number(image) for image in found.images] == found.indices
    assert found.times == pytest.approx([0.08 * i for i in found.indices], abs=0.001)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_a_still_image(tmp_path: Path, moving_frames: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"still.{suffix}"
    Image.fromarray(moving_frames[5]).save(path, quality=95)
    found = read_frames(path, 8)
    assert found.kind == "image" and len(found.images) == 1 and frame_number(found.images[0]) == 5


def test_a_photo_is_turned_upright(tmp_path: Path, moving_frames: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    Image.fromarray(moving_frames[0]).save(tmp_path / "photo.jpg", exif=exif)
    assert read_frames(tmp_path / "photo.jpg", 1).images[0].shape == (128, 96, 3)


def test_a_folder_of_images_in_natural_order(tmp_path: Path, moving_frames: np.ndarray) -> None:
    for i, frame in enumerate(moving_frames[:12]):
        Image.fromarray(frame).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    found = read_frames(tmp_path, 12)
    assert sorted({frame_number(image) for image in found.images}) == sorted(set(found.indices))
    assert [frame_number(image) for image in found.images] == found.indices
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="holds no images"):
        read_frames(tmp_path / "empty", 4)


# -- bad files -------------------------------------------------------------------------------------------------------


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


def test_sound_without_pictures(tmp_path: Path) -> None:
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


def _png_header(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (1, 1, "too small"),
        (16000, 16000, "too large"),
        (60000, 100, "too large"),
        (2**31 - 1, 2**31 - 1, "large|damaged"),
    ],
)
def test_sizes_are_checked_before_anything_is_allocated(
    tmp_path: Path, width: int, height: int, words: str
) -> None:
    (tmp_path / "odd.png").write_bytes(_png_header(width, height))
    with pytest.raises(MediaError, match=words):
        read_frames(tmp_path / "odd.png", 4)


def test_a_video_of_huge_frames(tmp_path: Path) -> None:
    """The size stands in the header; it is refused before a frame is decoded."""
    path = tmp_path / "huge.y4m"
    path.write_bytes(b"YUV4MPEG2 W16000 H16000 F25:1 Ip C420jpeg\nFRAME\n" + bytes(10000))
    with pytest.raises(MediaError, match="too large"):
        read_frames(path, 2)


def test_a_tiny_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "tiny.avi", np.zeros((3, 2, 2, 3), np.uint8), codec="mpeg4", options={})
    with pytest.raises(MediaError, match="too small"):
        read_frames(path, 2)


@pytest.mark.parametrize("share", [0.4, 0.7, 0.9])
def test_a_truncated_video_gives_what_there_is_and_says_so(
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


def test_a_truncated_mp4_without_its_index(video_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    data = video_file.read_bytes()
    path.write_bytes(data[: data.index(b"moov")])  # the index stands at the end
    with pytest.raises(MediaError, match="not a video that can be read"):
        read_frames(path, 4)


def test_a_truncated_mp4_with_its_index_in_front(tmp_path: Path, moving_frames: np.ndarray) -> None:
    path = tmp_path / "front.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "10", "g": "6"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for image in moving_frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.7)])
    found = read_frames(path, 6)
    assert found.notes and "truncated" in found.notes[0] and "could be decoded" in found.notes[0]
    assert found.indices[-1] < 23 and len(found.images) == 6


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bits_never_do_more_than_one_clear_error(
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
@given(
    st.sampled_from(
        [
            b"",
            b"RIFF\x10\0\0\0AVI LIST",
            b"\x1aE\xdf\xa3",
            b"GIF89a",
            b"\x89PNG\r\n\x1a\n",
            b"\0\0\0\x18ftypmp42",
        ]
    ),
    st.binary(max_size=400),
)
def test_arbitrary_bytes_as_a_video(tmp_path: Path, magic: bytes, rest: bytes) -> None:
    path = tmp_path / "junk.bin"
    path.write_bytes(magic + rest)
    try:
        read_frames(path, 3)
    except MediaError as error:
        assert "\n" not in str(error)


def test_decoding_threads_never_need_the_interpreter(video_file: Path) -> None:
    """A log level of ours made them call Python: a decoder that was freed while one of them did so hung for good."""
    code = f"import av.logging; from ppllava_edge.runtime.media.readers import read_frames; read_frames({str(video_file)!r}, 4); print(av.logging.get_level())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "None" and not run.stderr, run.stderr
