"""Encoded files: the right frames are sampled, with the right times and orientation."""

from __future__ import annotations

import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from helpers.commands import frame_number
from helpers.encoded_clips import Clips, encode_clip
from ppllava_edge.runtime.media.readers import open_reader
from ppllava_edge.runtime.media.thumbnails import read_pictures
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
        pytest.skip(f"this FFmpeg can't encode {codec} with these options: {error}")
    found = read_frames(path, 6)
    assert found.indices == sample_indices(24, 12.0, 6)
    assert [frame_number(image) for image in found.images] == found.indices
    assert found.times == pytest.approx([i / 12 for i in found.indices], abs=0.01)
    assert not found.notes and found.kind == "video" and found.images[0].shape == (96, 128, 3)


def test_variable_frame_rate(tmp_path: Path, moving_frames: np.ndarray) -> None:
    """Frames are chosen by number; their times are the file's."""
    times = [0]
    for i in range(1, 24):
        times.append(times[-1] + (40 if i % 3 else 400))
    path = encode_clip(tmp_path / "vfr.mkv", "libx264", {"crf": "10"}, frames=moving_frames, times=times)
    found = read_frames(path, 24)
    assert [frame_number(image) for image in found.images] == found.indices
    assert found.times == pytest.approx([times[i] / 1000 for i in found.indices], abs=0.002)


def test_rotation_metadata(tmp_path: Path, moving_frames: np.ndarray) -> None:
    """A phone's portrait video: frames are stored in landscape, the container says how to rotate them."""
    frames = moving_frames.copy()
    frames[:, :30, :40] = (20, 30, 220)  # blue, in the upper left as stored
    path = write_video(tmp_path / "rotated.mp4", frames, fps=12, options={"crf": "10"})
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # the display matrix of a version-0 track header
    one = 1 << 16
    clockwise = (0, one, 0, -one, 0, 0, 96 * one, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *clockwise)
    path.write_bytes(data)
    image = read_frames(path, 1).images[0]
    assert image.shape == (128, 96, 3)
    blue = np.argwhere((image[..., 2] > 150) & (image[..., 0] < 90)).mean(0)
    assert blue[0] < 40 and blue[1] > 60, "rotated clockwise, the upper left becomes the upper right"


def test_decoding_threads_never_need_the_interpreter(video_file: Path) -> None:
    """With another log level they call Python: freeing a decoder at that moment would deadlock."""
    code = f"""
import av.logging
from ppllava_edge.runtime.vision.frame_choice import read_frames
read_frames({str(video_file)!r}, 4)
print(av.logging.get_level())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "None" and not run.stderr, run.stderr


def test_threads_share_a_reader_for_pictures(clips: Clips) -> None:
    """A view's pictures are read again on demand, perhaps by several threads at once."""
    reader = open_reader(clips.path("h264 with B-frames"))
    wanted = [[i, 40 + i, 90 + 2 * i] for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda numbers: read_pictures(reader, numbers), wanted))
    for numbers, pictures in zip(wanted, found):
        assert sorted(pictures) == numbers
        for number in numbers:
            np.testing.assert_array_equal(pictures[number], clips.frames("h264 with B-frames")[number])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("sound_first", [True, False])
def test_all_frames_come_out_beside_sound(
    sound_first: bool, suffix: str, tmp_path: Path, moving_frames: np.ndarray
) -> None:
    """The decoder keeps its last frames until the empty packet of the video stream flushes it."""
    path = tmp_path / f"sound.{suffix}"
    with av.open(str(path), "w") as container:
        streams: dict[str, Any] = {}
        for kind in ("sound", "video") if sound_first else ("video", "sound"):
            codec = "aac" if kind == "sound" else "libx264"
            streams[kind] = container.add_stream(codec, rate=16000 if kind == "sound" else 12)
        video, sound = streams["video"], streams["sound"]
        video.height, video.width = moving_frames.shape[1:3]
        video.options, video.pix_fmt = {"crf": "10", "bf": "3"}, "yuv420p"
        for image in moving_frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 32000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux([*sound.encode(silence), *sound.encode()])
    reader = open_reader(path)
    frames = list(reader.frames(lambda r: range(r.count)))
    assert reader.count == len(moving_frames) and not reader.notes
    assert [frame_number(frame.image) for frame in frames] == list(range(len(moving_frames)))
