"""Frames found by seeking are the very ones that a full decode gives, whatever the codec, the container and its mistakes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppllava_edge.runtime.media import seeking
from ppllava_edge.runtime.media.packet_index import index_packets
from ppllava_edge.runtime.media.readers import VideoReader

COUNT, SIZE = 150, (96, 64)

# name: (suffix, codec, codec options, container options)
KINDS: dict[str, tuple[str, str, dict[str, str], dict[str, str]]] = {
    "h264 with B-frames": ("mp4", "libx264", {"bf": "3", "g": "24", "x264-params": "b-pyramid=normal"}, {}),
    "h264 in open groups": (
        "mp4",
        "libx264",
        {"bf": "3", "g": "24", "x264-params": "open-gop=1:scenecut=0"},
        {},
    ),
    "h264 in open groups, mkv": (
        "mkv",
        "libx264",
        {"bf": "3", "g": "24", "x264-params": "open-gop=1:scenecut=0"},
        {},
    ),
    "h264 in fragments": ("mp4", "libx264", {"bf": "2", "g": "24"}, {"movflags": "frag_keyframe+empty_moov"}),
    "h264 in a transport stream": ("ts", "libx264", {"bf": "2", "g": "24"}, {}),
    "h264 with a gradual refresh": (
        "mp4",
        "libx264",
        {"g": "24", "x264-params": "intra-refresh=1:bframes=0"},
        {},
    ),
    "h264 with one key frame": ("mp4", "libx264", {"g": "10000", "x264-params": "keyint=infinite"}, {}),
    "hevc in open groups": (
        "mp4",
        "libx265",
        {"x265-params": "open-gop=1:keyint=24:min-keyint=24:bframes=3:log-level=none"},
        {},
    ),
    "hevc in closed groups, mkv": (
        "mkv",
        "libx265",
        {"x265-params": "open-gop=0:keyint=24:log-level=none"},
        {},
    ),
    "vp9": (
        "webm",
        "libvpx-vp9",
        {"g": "24", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "10"},
        {},
    ),
    "vp8 with frames that aren't shown": (
        "webm",
        "libvpx",
        {"g": "24", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "10"},
        {},
    ),
    "av1": ("mp4", "libsvtav1", {"g": "24", "preset": "12", "svtav1-params": "lookahead=0"}, {}),
    "mpeg-4 in mp4": ("mp4", "mpeg4", {"g": "24", "bf": "2"}, {}),
    "mpeg-4 in avi": ("avi", "mpeg4", {"g": "24", "bf": "2"}, {}),
    "mpeg-2": ("mpg", "mpeg2video", {"g": "24", "bf": "2"}, {}),
    "mpeg-2 in a transport stream": ("ts", "mpeg2video", {"g": "24", "bf": "2"}, {}),
    "motion jpeg": ("mov", "mjpeg", {"strict": "unofficial"}, {}),
    "no timestamps at all": ("h264", "libx264", {"g": "24", "bf": "2"}, {}),
}


def pictures() -> np.ndarray:
    """(COUNT, H, W, 3): noise that moves, so that every frame is another and refers to those before it."""
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)
    smooth = np.repeat(np.repeat(noise[::8, ::8], 8, 0), 8, 1)
    return np.stack([np.roll(smooth, (i, 2 * i), (0, 1)) // 2 + i for i in range(COUNT)])


def write(
    path: Path,
    codec: str,
    options: dict[str, str],
    container_options: dict[str, str] | None = None,
    times: list[int] | None = None,
) -> Path:
    """Encode the pictures. times: presentation times in milliseconds instead of 25 frames a second."""
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(pictures()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def full_decode(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def found_by(path: Path, wanted: list[int], seeking_allowed: bool = True) -> dict[int, np.ndarray]:
    return {
        frame.number: frame.image
        for frame in VideoReader(path, seeking_allowed).frames(lambda reader: wanted)
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"folder": tmp_path_factory.mktemp("codecs")}


def clip(made: dict[str, Path], kind: str) -> Path:
    suffix, codec, options, container_options = KINDS[kind]
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec} encoder")
    if kind not in made:
        made[kind] = write(made["folder"] / f"{len(made)}.{suffix}", codec, options, container_options)
    return made[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_single_frame_by_seeking_is_that_of_a_full_decode(
    kind: str, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clip(made, kind)
    whole = full_decode(path)
    monkeypatch.setattr("ppllava_edge.runtime.video.is_worthwhile", lambda index, wanted: True)
    rng = np.random.default_rng(0)
    choices = [[int(i)] for i in rng.choice(len(whole), 24, replace=False)] + [
        sorted(rng.choice(len(whole), 8, replace=False).tolist()),
        [0],
        [len(whole) - 1],
    ]
    for wanted in choices:
        found = found_by(path, wanted)
        assert sorted(found) == wanted
        for i in wanted:
            np.testing.assert_array_equal(found[i], whole[i], err_msg=f"frame {i} of {wanted}")


SEEKABLE = [
    "h264 with B-frames",
    "h264 in open groups",
    "hevc in open groups",
    "h264 in a transport stream",
    "vp9",
    "av1",
    "mpeg-4 in mp4",
]


@pytest.mark.parametrize("kind", SEEKABLE)
def test_these_are_found_without_decoding_everything(
    kind: str, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the test above would hold for a reader that never seeks."""
    path = clip(made, kind)
    reader = VideoReader(path)
    monkeypatch.setattr(reader, "_decode", lambda wanted: pytest.fail("decoded from the beginning"))
    wanted = [60, 100, 101, 140]
    assert reader.index.seekable and [frame.number for frame in reader.frames(lambda r: wanted)] == wanted


def test_the_table_of_an_mp4_says_what_its_packets_say(made: dict[str, Path]) -> None:
    for kind in ("h264 with B-frames", "h264 in open groups", "hevc in open groups", "av1"):
        path = clip(made, kind)
        table, packets = index_packets(path), index_packets(path, table=False)
        assert table.from_table and not packets.from_table and table.seekable and packets.seekable
        assert (table.count, table.origin, table.fps) == (packets.count, packets.origin, packets.fps)
        np.testing.assert_array_equal(table.keys, packets.keys)
        np.testing.assert_array_equal(table.starts, packets.starts)


@pytest.mark.parametrize("flags", ["frag_keyframe", "frag_keyframe+empty_moov", "dash", "faststart"])
def test_frames_of_fragmented_files_are_all_counted(flags: str, tmp_path: Path) -> None:
    """Their table holds only what was read so far."""
    path = write(tmp_path / "fragments.mp4", "libx264", {"g": "24", "bf": "2"}, {"movflags": flags})
    index = index_packets(path)
    assert index.count == index.promised == COUNT == len(full_decode(path)) and index.from_table == (
        flags == "faststart"
    )


def test_a_variable_frame_rate(tmp_path: Path) -> None:
    rng, times = np.random.default_rng(1), [0]
    for _ in range(COUNT - 1):
        times.append(times[-1] + int(rng.choice([20, 40, 500])))
    for suffix in ("mkv", "mp4"):
        path = write(tmp_path / f"vfr.{suffix}", "libx264", {"bf": "3", "g": "24"}, times=times)
        whole = full_decode(path)
        frames = list(VideoReader(path).frames(lambda reader: [30, 77, 78, 131]))
        for frame in frames:
            np.testing.assert_array_equal(frame.image, whole[frame.number])
            assert frame.seconds == pytest.approx(times[frame.number] / 1000, abs=0.005)


def remux(path: Path, target: Path, change: Any) -> Path:
    """Copy packets, their times changed. change: (packet number, packet) → whether to keep it."""
    with av.open(str(path)) as source, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.size and change(i, packet):
                packet.stream = stream
                container.mux(packet)
    return target


@pytest.mark.parametrize(
    "fault", ["times start again", "two at once", "a jump of an hour", "the key frame is missing"]
)
def test_broken_timestamps(fault: str, made: dict[str, Path], tmp_path: Path) -> None:
    """Whatever they say, the frames are those of a full decode."""
    step: list[int] = []

    def change(i: int, packet: Any) -> bool:
        step.append(packet.duration or 40)
        if fault == "the key frame is missing":
            return i != 72
        if i >= 72 and fault == "a jump of an hour":
            packet.pts, packet.dts = packet.pts + 90000 * 3600, packet.dts + 90000 * 3600
        if i == 75 and fault == "two at once":
            packet.pts -= packet.duration or 1
        if i >= 72 and fault == "times start again":
            packet.pts, packet.dts = packet.pts - 72 * step[0], packet.dts - 72 * step[0]
        return True

    path = tmp_path / "broken.ts"
    try:
        remux(clip(made, "h264 in a transport stream"), path, change)
    except (
        av.error.FFmpegError
    ):  # the muxer refuses times that fall: join two files instead, as broken recorders do
        data = clip(made, "h264 in a transport stream").read_bytes()
        path.write_bytes(data + data)
    whole = full_decode(path)
    wanted = sorted({10, len(whole) // 2, len(whole) - 5})
    found = found_by(path, wanted)
    for i, image in found.items():
        np.testing.assert_array_equal(image, whole[i], err_msg=f"frame {i}")
    assert len(found) == len(wanted)


def test_a_file_without_its_index(tmp_path: Path, made: dict[str, Path]) -> None:
    """A Matroska file whose end, where the cues stand, is lost."""
    data = clip(made, "h264 in open groups, mkv").read_bytes()
    path = tmp_path / "no-cues.mkv"
    path.write_bytes(data[: data.rindex(b"\x1c\x53\xbb\x6b")])
    whole = full_decode(path)
    for i, image in found_by(path, [50, 90, 120]).items():
        np.testing.assert_array_equal(image, whole[i])


@pytest.mark.parametrize("fault", ["groups begin elsewhere", "times of another file"])
def test_a_table_that_is_wrong_is_not_believed(
    fault: str, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clip(made, "h264 with B-frames")
    whole, wrong = full_decode(path), index_packets(path)
    if fault == "groups begin elsewhere":
        wrong.keys, wrong.starts = (
            wrong.keys + (np.arange(len(wrong.keys)) > 2),
            wrong.starts + (np.arange(len(wrong.keys)) > 2),
        )
    else:
        wrong.names = wrong.names + 7
    monkeypatch.setattr(
        "ppllava_edge.runtime.video.index_packets",
        lambda path, table=True: wrong if table else index_packets(path, table=False),
    )
    found = found_by(path, [20, 90, 140])
    assert wrong.from_table and sorted(found) == [20, 90, 140]
    for i, image in found.items():
        np.testing.assert_array_equal(image, whole[i])


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, COUNT - 1), min_size=1, max_size=12))
def test_any_choice_of_frames(made: dict[str, Path], wanted: set[int]) -> None:
    path = clip(made, "h264 in open groups")
    if "whole" not in made:
        made["whole"] = full_decode(path)  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppllava_edge.runtime.video.is_worthwhile", lambda index, wanted: True)
        found = found_by(path, sorted(wanted))
    assert set(found) == wanted
    for i in wanted:
        np.testing.assert_array_equal(found[i], made["whole"][i])  # type: ignore[index]


def test_what_nothing_refers_to_is_not_decoded(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the frames between a key frame and the wanted one are skipped, and the picture is the same."""
    path = clip(made, "h264 with B-frames")
    whole = full_decode(path)
    monkeypatch.setattr(seeking, "SKIPPABLE", set())
    plain = found_by(path, [140])[140]
    monkeypatch.undo()
    np.testing.assert_array_equal(found_by(path, [140])[140], plain)
    np.testing.assert_array_equal(plain, whole[140])
