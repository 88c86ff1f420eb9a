"""Encode test clips with many codecs and containers, and decode them completely for comparison."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest

COUNT = 150  # frames of each clip
SIZE = (96, 64)  # width, height
OPEN_GOP = {"bf": "3", "g": "24", "x264-params": "open-gop=1:scenecut=0"}
GOLDEN_FRAMES = {"g": "24", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "10"}


class Kind(NamedTuple):
    """How a clip is encoded."""

    suffix: str
    codec: str
    options: dict[str, str]
    container_options: dict[str, str] | None = None


KINDS = {
    "h264 with B-frames": Kind("mp4", "libx264", {"bf": "3", "g": "24", "x264-params": "b-pyramid=normal"}),
    "h264 in open groups": Kind("mp4", "libx264", OPEN_GOP),
    "h264 in open groups, mkv": Kind("mkv", "libx264", OPEN_GOP),
    "h264 in fragments": Kind(
        "mp4", "libx264", {"bf": "2", "g": "24"}, {"movflags": "frag_keyframe+empty_moov"}
    ),
    "h264 in a transport stream": Kind("ts", "libx264", {"bf": "2", "g": "24"}),
    "h264 with a gradual refresh": Kind(
        "mp4", "libx264", {"g": "24", "x264-params": "intra-refresh=1:bframes=0"}
    ),
    "h264 with one key frame": Kind("mp4", "libx264", {"g": "10000", "x264-params": "keyint=infinite"}),
    "hevc in open groups": Kind(
        "mp4",
        "libx265",
        {"x265-params": "open-gop=1:keyint=24:min-keyint=24:bframes=3:log-level=none"},
    ),
    "hevc in closed groups, mkv": Kind(
        "mkv", "libx265", {"x265-params": "open-gop=0:keyint=24:log-level=none"}
    ),
    "vp9": Kind("webm", "libvpx-vp9", GOLDEN_FRAMES),
    "vp8 with frames that aren't shown": Kind("webm", "libvpx", GOLDEN_FRAMES),
    "av1": Kind("mp4", "libsvtav1", {"g": "24", "preset": "12", "svtav1-params": "lookahead=0"}),
    "mpeg-4 in mp4": Kind("mp4", "mpeg4", {"g": "24", "bf": "2"}),
    "mpeg-4 in avi": Kind("avi", "mpeg4", {"g": "24", "bf": "2"}),
    "mpeg-2": Kind("mpg", "mpeg2video", {"g": "24", "bf": "2"}),
    "mpeg-2 in a transport stream": Kind("ts", "mpeg2video", {"g": "24", "bf": "2"}),
    "motion jpeg": Kind("mov", "mjpeg", {"strict": "unofficial"}),
    "no timestamps at all": Kind("h264", "libx264", {"g": "24", "bf": "2"}),
}


@contextmanager
def own_scheduling() -> Iterator[None]:
    """Keep this process's scheduling policy: as root, SVT-AV1 makes it real-time; other threads starve."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


class Clips:
    """Clips of every kind, each encoded and decoded once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self._frames: dict[str, list[np.ndarray]] = {}

    def path(self, kind: str) -> Path:
        """The clip of a kind. Skips the test if this FFmpeg lacks the encoder."""
        suffix, codec, options, container_options = KINDS[kind]
        if codec not in av.codecs_available:
            pytest.skip(f"this FFmpeg has no {codec} encoder")
        if kind not in self._paths:
            path = self.folder / f"{len(self._paths)}.{suffix}"
            with own_scheduling():
                self._paths[kind] = encode_clip(path, codec, options, container_options)
        return self._paths[kind]

    def frames(self, kind: str) -> list[np.ndarray]:
        """All frames of a kind's clip, by a full decode."""
        if kind not in self._frames:
            self._frames[kind] = full_decode(self.path(kind))
        return self._frames[kind]


def moving_noise() -> np.ndarray:
    """(COUNT, H, W, 3) uint8: noise that moves, so that all frames differ and refer to those before them."""
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)
    smooth = np.repeat(np.repeat(noise[::8, ::8], 8, 0), 8, 1)
    return np.stack([np.roll(smooth, (i, 2 * i), (0, 1)) // 2 + i for i in range(COUNT)])


def encode_clip(
    path: Path,
    codec: str,
    options: dict[str, str],
    container_options: dict[str, str] | None = None,
    frames: np.ndarray | None = None,
    fps: int = 25,
    times: list[int] | None = None,
) -> Path:
    """Encode moving noise, or the given frames (T, H, W, 3).

    Args:
        path: The file; its suffix sets the container format.
        codec: FFmpeg's name of the encoder.
        options: The encoder's options.
        container_options: The muxer's options.
        frames: RGB uint8; moving_noise() by default.
        fps: Frames a second.
        times: Presentation times in milliseconds, instead of a constant rate.
    """
    frames = moving_noise() if frames is None else frames
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def full_decode(path: Path) -> list[np.ndarray]:
    """All frames of a file, RGB uint8 (H, W, 3)."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def remux(path: Path, target: Path, change: Callable[[int, Any], bool]) -> Path:
    """Copy a file's packets without re-encoding them.

    Args:
        path: The source.
        target: The copy.
        change: Called with each packet and its number; may change its times. False: the packet is dropped.
    """
    with av.open(str(path)) as source, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.size and change(i, packet):
                packet.stream = stream
                container.mux(packet)
    return target
