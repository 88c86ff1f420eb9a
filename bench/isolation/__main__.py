"""Time opening and reading videos in this process and in a child process, and measure the child's memory.

python -m ppllava_edge.bench.isolation [VIDEO ...]
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.engines.terminal import Command, table
from ppllava_edge.nano import sample_path
from ppllava_edge.runtime.media.isolation import open_source
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS
from ppllava_edge.runtime.media.writing import write_video
from ppllava_edge.runtime.vision.frame_choice import choose_frames

SIZES = {"480p": (480, 854), "1080p": (1080, 1920), "4K": (2160, 3840)}  # height, width
CLIP_FRAMES, CLIP_FPS = 60, 20


def measure(path: Path, frames: int, rounds: int) -> dict[str, Any]:
    """Open a video and read frames of it, in turns in this process and in a child.

    Args:
        path: The video.
        frames: How many to read, evenly spaced.
        rounds: How often; medians are reported.

    Returns:
        "open", "open_isolated", "read", "read_isolated": seconds. "frame_mb": size of a frame. "child_mb":
        the child's resident memory once the video is open, "child_peak_mb": at most; None where /proc
        doesn't tell. Megabytes are 10**6 bytes.
    """
    seconds: dict[str, list[float]] = {}
    sizes, opened, peaks = list[int](), list[float](), list[float]()
    for _ in range(rounds):
        for suffix, isolate in (("", False), ("_isolated", True)):
            began = time.perf_counter()
            reader = open_source(path, DEFAULT_LIMITS, isolate)
            seconds.setdefault("open" + suffix, []).append(time.perf_counter() - began)
            opened += _child_memory("VmRSS")
            began = time.perf_counter()
            peak = list[float]()
            for frame in reader.frames(lambda r: choose_frames(r, frames, None, None)):
                sizes.append(frame.image.nbytes)
                peak = _child_memory("VmHWM") or peak
            seconds.setdefault("read" + suffix, []).append(time.perf_counter() - began)
            peaks += peak
    return {
        **{name: float(np.median(values)) for name, values in seconds.items()},
        "frame_mb": max(sizes) / 10**6,
        "child_mb": max(opened, default=None),
        "child_peak_mb": max(peaks, default=None),
    }


def _child_memory(name: str) -> list[float]:
    """A figure of this process's only child, in megabytes; empty if it has none or /proc doesn't tell."""
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            for line in (Path("/proc") / pid / "status").read_text().splitlines():
                if line.startswith(f"{name}:"):
                    return [int(line.split()[1]) * 1024 / 10**6]
    return []


def _clip(folder: Path, name: str) -> Path:
    """A clip of moving noise in one of SIZES."""
    height, width = SIZES[name]
    noise = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    picture = np.repeat(np.repeat(noise, 8, 0), 8, 1)[:height, :width]
    moving = (np.roll(picture, 4 * i, 1) for i in range(CLIP_FRAMES))
    return write_video(folder / f"{name}.mp4", moving, CLIP_FPS)


def _rows(name: str, row: dict[str, Any]) -> tuple[Any, ...]:
    """A line of the table."""
    megabytes: Callable[[float | None], str] = lambda value: "?" if value is None else f"{value:.0f}"  # noqa: E731
    times = [f"{1000 * row[key]:.0f}" for key in ("open", "open_isolated", "read", "read_isolated")]
    return name, *times, f"{row['frame_mb']:.1f}", megabytes(row["child_mb"]), megabytes(row["child_peak_mb"])


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("videos", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--frames", type=click.IntRange(1), default=16, show_default=True, help="Frames to read of each."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Medians are of so many."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(videos: Sequence[Path], frames: int, rounds: int, as_json: bool) -> None:
    """Compare decoding VIDEOS (the sample, and clips in 480p, 1080p and 4K) here and in a child process."""
    with tempfile.TemporaryDirectory() as folder:
        paths = list(videos) or [sample_path(), *(_clip(Path(folder), name) for name in SIZES)]
        report = {path.name: measure(path, frames, rounds) for path in paths}
    if as_json:
        print(json.dumps(report))
        return
    heads = ("video", "open", "isolated", "read", "isolated", "a frame", "child, open", "child, peak")
    title = f"ms to open a video and to read {frames} frames, medians of {rounds}; MB"
    table(title, heads, [_rows(name, row) for name, row in report.items()])


if __name__ == "__main__":
    main()
