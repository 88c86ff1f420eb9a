"""What a source may cost: pixels, streams, packets and time are bounded, and the limits can be set."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from helpers.encoded_clips import Clips, encode_clip
from ppllava_edge import MediaLimits, VideoQA
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media import readers
from ppllava_edge.runtime.media.limits import Budget
from ppllava_edge.runtime.media.packet_index import index_packets
from ppllava_edge.runtime.media.readers import FrameReader, VideoReader, open_reader


def _read(source: Path, limits: MediaLimits, numbers: list[int] | None = None) -> int:
    """How many frames come out."""
    reader = open_reader(source, limits)
    return sum(1 for _ in reader.frames(lambda r: range(r.count) if numbers is None else numbers))


def _refused(source: Path, limit: str, **limits: Any) -> None:
    """The source passes without the limit, and is refused with it; the error names it."""
    assert _read(source, MediaLimits()) > 0
    with pytest.raises(MediaError, match=limit) as caught:
        _read(source, MediaLimits(**limits))
    assert "\n" not in str(caught.value)


def test_limits_from_the_command_line() -> None:
    limits = MediaLimits.parse(
        ["max_side=8192", "max_pixels=2e9", " decode_seconds = 2.5 ", "memory=1000000"]
    )
    assert (limits.max_side, limits.max_pixels, limits.decode_seconds) == (8192, 2_000_000_000, 2.5)
    assert MediaLimits.parse([]) == MediaLimits() and limits.max_streams == MediaLimits().max_streams
    assert MediaLimits.parse(["decode_seconds=none"]).decode_seconds is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_side", "NAME=VALUE"),
        ("width=3", "no limit 'width'; the limits are max_side"),
        ("max_side=", "must be a number"),
        ("max_side=0", "above 0"),
        ("max_side=-5", "above 0"),
        ("max_side=1.5", "whole number"),
        ("max_side=nan", "whole number"),
        ("max_side=1e400", "whole number"),
        ("max_side=none", "must be a number"),
        ("max_side=" + "9" * 5000, "above 0"),
        ("decode_seconds=inf", "above 0"),
        ("decode_seconds=nan", "above 0"),
        ("decode_seconds=0", "above 0"),
    ],
)
def test_limits_that_are_none(text: str, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        MediaLimits.parse([text])


@given(st.sampled_from(["max_side", "decode_seconds", "memory", "x", ""]), st.text(max_size=20))
def test_any_text_as_a_limit(name: str, text: str) -> None:
    try:
        MediaLimits.parse([f"{name}={text}"])
    except MediaError as error:
        assert str(error)


def test_a_wrong_type_as_a_limit() -> None:
    for value in ("5", None, True, 2.0, -1, float("nan")):
        with pytest.raises(MediaError, match="max_side"):
            MediaLimits(max_side=value)  # type: ignore[arg-type]


# -- videos ----------------------------------------------------------------------------------------------


def test_an_hour_of_4k_video_is_allowed() -> None:
    budget = Budget("video")
    budget.add(3840, 2160)
    budget.expect(3600 * 60, 3840, 2160)


def test_a_frame_of_a_video(clips: Clips) -> None:
    path = clips.path("h264 with B-frames")
    _refused(path, "max_side", max_side=95)
    _refused(path, "max_frame_pixels", max_frame_pixels=96 * 64 - 1)


@pytest.mark.parametrize("kind", ["h264 with B-frames", "h264 with one key frame", "mpeg-2"])
def test_pixels_of_a_video(clips: Clips, kind: str) -> None:
    _refused(clips.path(kind), "max_pixels", max_pixels=96 * 64 * 100)
    reader = open_reader(clips.path(kind), MediaLimits(max_pixels=96 * 64 * 100))
    for _ in range(2):  # each reading has the whole limit
        assert len(list(reader.frames(lambda r: [0, 60]))) == 2


def test_too_many_pixels_are_refused_before_any_is_decoded(
    clips: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VideoReader, "_decode_packets", lambda *arguments: pytest.fail("decoded"))
    reader = open_reader(clips.path("h264 with one key frame"), MediaLimits(max_pixels=96 * 64 * 100))
    with pytest.raises(MediaError, match="max_pixels"):
        list(reader.frames(lambda r: [149]))


def test_frames_that_grow_in_the_middle(tmp_path: Path, clips: Clips) -> None:
    """A decoder takes each frame's size from its own header; it refuses one before it allocates it."""
    small = encode_clip(tmp_path / "small.h264", "libx264", {"g": "24"})
    rng = np.random.default_rng(1)
    large = encode_clip(
        tmp_path / "large.h264",
        "libx264",
        {"g": "24"},
        frames=rng.integers(0, 255, (30, 256, 256, 3), np.uint8),
    )
    joined = tmp_path / "joined.h264"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    assert _read(joined, MediaLimits()) == 180
    reader = open_reader(joined, MediaLimits(max_frame_pixels=128 * 128))
    try:
        frames = list(reader.frames(lambda r: range(r.count)))
    except MediaError as error:
        assert "too large" in str(error)
    else:
        numbers = {frame.number for frame in frames}  # a damaged file is read twice
        assert len(numbers) <= 150 and all(frame.image.shape == (64, 96, 3) for frame in frames)


def test_streams_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "many.mkv"
    with av.open(str(path), "w") as container:
        streams: list[Any] = [container.add_stream("mpeg4", rate=25) for _ in range(6)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for stream in streams:
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            for packet in [*stream.encode(frame), *stream.encode()]:
                container.mux(packet)
    _refused(path, "max_streams", max_streams=5)
    _refused(path, "streams|memory", max_streams=2)


@pytest.mark.parametrize("kind", ["h264 with B-frames", "mpeg-2 in a transport stream"])
def test_packets_of_a_video(clips: Clips, kind: str) -> None:
    _refused(clips.path(kind), "max_packets", max_packets=149)
    assert index_packets(clips.path(kind)).count >= 149


class _Clock:
    """A clock that advances by a step at each look."""

    def __init__(self, step: float):
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.mark.parametrize("kind", ["h264 with B-frames", "h264 with one key frame", "mpeg-2"])
def test_the_time_of_decoding(clips: Clips, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    reader = open_reader(clips.path(kind), MediaLimits(decode_seconds=50))
    monkeypatch.setattr("ppllava_edge.runtime.media.limits.time.monotonic", _Clock(1.0))
    with pytest.raises(MediaError, match="longer than 50 s"):
        list(reader.frames(lambda r: range(r.count)))
    with pytest.raises(MediaError, match="longer than 50 s"):
        open_reader(clips.path("mpeg-2"), MediaLimits(decode_seconds=50))


def test_ffmpeg_itself_stops_when_the_time_is_over(clips: Clips) -> None:
    for kind in ("h264 with B-frames", "mpeg-2"):
        with pytest.raises(MediaError, match="decode_seconds"):
            open_reader(clips.path(kind), MediaLimits(decode_seconds=1e-9))


def test_waiting_for_the_consumer_costs_nothing(clips: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(0.0)
    monkeypatch.setattr("ppllava_edge.runtime.media.limits.time.monotonic", clock)
    reader = open_reader(clips.path("mpeg-2"), MediaLimits(decode_seconds=5))
    for _ in reader.frames(lambda r: range(20)):
        clock.now += 4.0


def test_limits_reach_every_reading(clips: Clips) -> None:
    """Opening, and reading pictures again from a cached video."""
    with VideoQA(device="cpu", limits=MediaLimits(max_side=95)) as qa, pytest.raises(MediaError):
        qa.open(clips.path("mpeg-2"))


# -- images and animations -------------------------------------------------------------------------------


def _gif(width: int, height: int, count: int, delay: int = 8, canvas: tuple[int, int] | None = None) -> bytes:
    """A GIF of full-size pictures whose data ends at once."""
    header = b"GIF89a" + struct.pack("<HHBBB", *(canvas or (width, height)), 0x80, 0, 0) + bytes(6)
    control = b"!\xf9\x04\x00" + struct.pack("<H", delay) + b"\x00\x00"
    picture = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return header + (control + picture) * count + b";"


def _save_animation(path: Path, frames: np.ndarray, **options: Any) -> None:
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], loop=0, **options)


def test_an_animation_of_huge_pictures_is_refused_undecoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding it took 21 s, before the first frame was chosen."""
    (tmp_path / "bomb.gif").write_bytes(_gif(6000, 6000, 60))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda picture: pytest.fail("decoded"))
    with pytest.raises(MediaError, match="max_animation_pixels"):
        open_reader(tmp_path / "bomb.gif")


def test_a_canvas_that_grows(tmp_path: Path) -> None:
    """A picture may be larger than the canvas that the header states."""
    for width, height, words in ((6000, 6000, "max_animation_pixels"), (65535, 65535, "too large")):
        (tmp_path / "grows.gif").write_bytes(_gif(width, height, 60, canvas=(16, 16)))
        with pytest.raises(MediaError, match=words):
            open_reader(tmp_path / "grows.gif")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_pictures_of_an_animation(tmp_path: Path, moving_frames: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    _save_animation(path, moving_frames, duration=[80] * 23 + [500])
    reader = open_reader(path)
    assert reader.count == 24 and reader.duration == pytest.approx(23 * 0.08 + 0.5)
    _refused(path, "max_animation_pixels", max_animation_pixels=96 * 128 * 24 - 1)
    _refused(path, "max_files", max_files=23)
    assert _read(path, MediaLimits(max_animation_pixels=96 * 128 * 24, max_files=24)) == 24


@pytest.mark.parametrize("cut", [3, 13, 30, 47, 48, 49, 60, 90])
def test_a_gif_that_is_cut_off(tmp_path: Path, cut: int) -> None:
    (tmp_path / "cut.gif").write_bytes(_gif(32, 32, 3)[:cut])
    try:
        _read(tmp_path / "cut.gif", MediaLimits())
    except MediaError as error:
        assert "\n" not in str(error)


@given(st.data())
def test_gif_pictures_are_counted_as_pillow_counts_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(_gif(16, 16, 4))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(13, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("gif") / "changed.gif"
    path.write_bytes(content)
    try:
        with Image.open(path) as picture:
            expected = picture.n_frames
    except Exception:
        return
    try:
        assert open_reader(path).count == expected
    except MediaError as error:
        assert "too large" in str(error) or "too small" in str(error)


def test_an_animation_that_announces_more_than_it_holds(tmp_path: Path, moving_frames: np.ndarray) -> None:
    path = tmp_path / "lies.png"
    _save_animation(path, moving_frames[:4], duration=80)
    data = bytearray(path.read_bytes())
    at = data.index(b"acTL") + 4
    data[at : at + 4] = struct.pack(">I", 50_000)
    data[at + 8 : at + 12] = struct.pack(">I", zlib.crc32(data[at - 4 : at + 8]))
    path.write_bytes(data)
    reader = open_reader(path)
    assert reader.count == 4 and len(list(reader.frames(lambda r: range(r.count)))) == 4


def test_pillows_settings_stay_the_apps(tmp_path: Path, moving_frames: np.ndarray) -> None:
    Image.fromarray(moving_frames[0]).save(tmp_path / "a.png")
    _save_animation(tmp_path / "b.gif", moving_frames[:3])
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    for path in (tmp_path / "a.png", tmp_path / "b.gif", tmp_path):
        _read(path, MediaLimits())
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before
    assert Image.MAX_IMAGE_PIXELS


def test_pillows_warning_as_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gif").write_bytes(_gif(64, 64, 1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match="too large"):
            open_reader(tmp_path / "a.gif")


def test_readers_keep_no_file_open(tmp_path: Path, moving_frames: np.ndarray, clips: Clips) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    sources = [clips.path("mpeg-2"), tmp_path / "b.gif", tmp_path / "c.webp", tmp_path / "d.png"]
    _save_animation(sources[1], moving_frames[:3])
    _save_animation(sources[2], moving_frames[:3])
    Image.fromarray(moving_frames[0]).save(sources[3])
    opened: list[FrameReader] = []
    before = len(os.listdir("/proc/self/fd"))
    for source in [*sources, tmp_path] * 3:
        reader = open_reader(source)
        frames = reader.frames(lambda r: [0, r.count - 1])
        next(frames)
        frames.close()  # type: ignore[attr-defined]
        assert len(list(reader.frames(lambda r: [0]))) == 1
        opened.append(reader)
    assert len(os.listdir("/proc/self/fd")) <= before and opened


def test_images_in_a_folder(tmp_path: Path, moving_frames: np.ndarray) -> None:
    for i in range(5):
        Image.fromarray(moving_frames[i]).save(tmp_path / f"{i}.png")
    _refused(tmp_path, "max_files", max_files=4)
    _refused(tmp_path, "max_pixels", max_pixels=96 * 128 * 5 - 1)
    _refused(tmp_path, "max_side", max_side=127)


def test_text_in_an_image_that_expands_to_gigabytes(tmp_path: Path) -> None:
    from PIL import PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "text.png", pnginfo=text)
    with pytest.raises(MediaError, match="too large"):  # Pillow's MAX_TEXT_CHUNK
        _read(tmp_path / "text.png", MediaLimits())


def test_large_files_are_left_to_ffmpeg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moving_frames: np.ndarray
) -> None:
    """Pillow reads a WebP file as a whole, however large it is."""
    Image.fromarray(moving_frames[0]).save(tmp_path / "a.webp")
    monkeypatch.setattr("ppllava_edge.runtime.media.pictures.MAX_FILE_BYTES", 10)
    monkeypatch.setattr(Image, "open", lambda *arguments, **options: pytest.fail("opened"))
    with pytest.raises(MediaError, match="not a video"):
        readers.open_reader(tmp_path / "a.webp")


def test_the_canvas_of_a_gif_counts_whatever_its_pictures_cover(tmp_path: Path) -> None:
    """Each small picture is drawn on a copy of the whole canvas."""
    path, pictures = tmp_path / "canvas.gif", [Image.new("L", (8, 8), 9 * i) for i in range(20)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    data = bytearray(path.read_bytes())
    data[6:10] = struct.pack("<HH", 512, 512)
    path.write_bytes(data)
    _refused(path, "max_animation_pixels", max_animation_pixels=19 * 512 * 512)


def test_time_of_a_file_with_little_but_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is looked at with each packet of sound, too."""
    path, checks = tmp_path / "sound.mkv", list[int]()
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        sound: Any = container.add_stream("pcm_s16le", rate=48000)
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux([*video.encode(frame), *video.encode()])
        for i in range(500):
            packet = av.Packet(bytes(96))
            packet.stream, packet.time_base, packet.pts, packet.dts = sound, Fraction(1, 1000), i, i
            container.mux(packet)
    monkeypatch.setattr(Budget, "check", lambda self: checks.append(1))
    assert open_reader(path).count == 1 and len(checks) >= 500
