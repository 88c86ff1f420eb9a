"""Read 32 frames of an hour: the runtime's seeking against OpenCV, decord, torchcodec and full decoding.

    python -m ppllava_edge.bench.long_video FOLDER

Creates FOLDER/60-minutes.mp4 unless it exists: one minute of 1080p H.264, encoded once and copied packet by
packet 60 times. Every reader runs in a process of its own; readers that aren't installed are left out (extra
`peers`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.bench.measuring.child_process import ChildError, run_json
from ppllava_edge.bench.peers.video_readers import READERS
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.terminal import Command, human_bytes, table
from ppllava_edge.runtime.media.writing import write_video
from ppllava_edge.runtime.vision.frame_choice import sample_indices

FPS = 30
SIZE = (1920, 1080)
MINUTE = 60  # seconds
MAX_DIFFERENCE = 3.0  # mean difference in RGB below which two libraries converted the same frame
MEMORY_LENGTHS = (10, 60, 3600, 7200)  # seconds of the videos whose peak memory is compared
SEQUENTIAL = ("OpenCV, sequential", "PyAV, sequential")
REFERENCE = "PyAV, sequential"  # a full decode


def make_minute(path: Path) -> None:
    """Write a minute of camera-like 1080p: a textured scene that pans, sensor noise, four moving squares."""
    from PIL import Image

    rng = np.random.default_rng(7)
    width, height = SIZE
    coarse = rng.integers(0, 255, (height // 40 + 40, width // 40 + 80, 3), np.uint8)
    full_size = (coarse.shape[1] * 40, coarse.shape[0] * 40)
    scene = np.asarray(Image.fromarray(coarse).resize(full_size, Image.Resampling.BICUBIC))
    noise = rng.normal(0, 3, (8, height, width, 1)).astype(np.int16)

    def frames() -> Iterator[np.ndarray]:
        for i in range(FPS * MINUTE):
            x, y = round(600 + 500 * np.sin(i / 200)), round(300 + 200 * np.sin(i / 330))
            view = scene[y : y + height, x : x + width].astype(np.int16)
            image = (view * 3 // 4 + noise[i % 8] + 16).clip(0, 255).astype(np.uint8)
            for k in range(4):
                left = (i * (3 + k) + 400 * k) % (width - 120)
                top = (200 * k + i * 2) % (height - 120)
                image[top : top + 90, left : left + 90] = (60 * k + 40, 200 - 40 * k, (i * 3) % 255)
            yield image

    write_video(path, frames(), FPS, options={"crf": "25", "preset": "veryfast"})


def repeat(minute: Path, target: Path, seconds: float) -> None:
    """Write a video of `seconds` by copying the packets of a minute again and again."""
    import av

    part = target.with_suffix(".part.mp4")
    with av.open(str(part), "w") as container:
        out: Any = None
        offset = 0
        for _ in range(max(1, round(seconds / MINUTE))):
            with av.open(str(minute)) as source:
                stream: Any = source.streams.video[0]
                out = out or container.add_stream_from_template(stream)
                length = round(MINUTE / float(stream.time_base or 1))
                for packet in source.demux(stream):
                    if not packet.size or packet.pts is None or packet.dts is None:
                        continue
                    if seconds >= MINUTE or float(packet.pts * stream.time_base) < seconds:
                        packet.pts += offset
                        packet.dts += offset
                        packet.stream = out
                        container.mux(packet)
                offset += length
    part.replace(target)


def run_reader(name: str, path: Path, indices: list[int], output: Path) -> dict[str, Any] | str:
    """Run video_readers.measure in a separate process. Returns its result, or the reason of a failure."""
    module = "ppllava_edge.bench.peers.video_readers"
    try:
        return run_json([sys.executable, "-m", module, name, str(path), json.dumps(indices), str(output)])
    except ChildError as error:
        return error.reason


def run_readers(
    folder: Path, video: Path, indices: list[int], rounds: int
) -> dict[str, dict[str, Any] | str]:
    """Measure all readers in turns, and compare their frames with those of a full decode.

    Args:
        folder: Folder for the frames that were read.
        video: The long video.
        indices: Frames to read.
        rounds: Runs of each reader that seeks; the others run once. The fastest run counts.

    Returns:
        Reader → the result of video_readers.measure, with "same" (count of frames that match a full decode)
        and "equal" (whether all match bit for bit); or the reason of a failure.
    """
    report: dict[str, dict[str, Any] | str] = {}
    for round_number in range(rounds):
        for name in READERS:
            best = report.get(name)
            if isinstance(best, str) or (best is not None and name in SEQUENTIAL):
                continue
            result = run_reader(name, video, indices, folder / f"{name}.npy")
            print(f"round {round_number + 1}: {name}: {result}", file=sys.stderr)
            if best is None or (not isinstance(result, str) and result["seconds"] < best["seconds"]):
                report[name] = result
    reference = np.load(folder / f"{REFERENCE}.npy").astype(np.int16)
    for name, result in report.items():
        if not isinstance(result, str):
            difference = np.abs(np.load(folder / f"{name}.npy").astype(np.int16) - reference)
            result["same"] = int((difference.mean((1, 2, 3)) < MAX_DIFFERENCE).sum())
            result["equal"] = bool((difference == 0).all())
    return report


def peak_of_length(folder: Path, minute: Path, seconds: int, frames: int) -> float:
    """Peak memory (bytes) of the runtime's reader over a video of this length.

    Raises:
        PPLLaVAError: If the reader fails.
    """
    path = folder / f"{seconds}-seconds.mp4"
    if not path.exists():
        repeat(minute, path, seconds)
    result = run_reader("ours", path, sample_indices(seconds * FPS, FPS, frames), folder / "memory.npy")
    if isinstance(result, str):
        raise PPLLaVAError(f"the runtime's reader failed on {path}: {result}")
    return float(result["peak"])


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--frames", type=click.IntRange(1, 1000), default=32, show_default=True, help="Frames to read.")
@click.option(
    "--minutes", type=click.IntRange(1, 600), default=60, show_default=True, help="Length of the video."
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 20),
    default=2,
    show_default=True,
    help="Rounds over the readers that seek; the fastest counts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(folder: Path, frames: int, minutes: int, rounds: int, as_json: bool) -> None:
    """Time every installed video reader on one long file, working in FOLDER.

    Checks that all read the same frames, and measures the runtime's peak memory from 10 seconds to 2 hours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    minute, video = folder / "minute.mp4", folder / f"{minutes}-minutes.mp4"
    if not minute.exists():
        make_minute(minute)
    if not video.exists():
        repeat(minute, video, minutes * MINUTE)
    indices = sample_indices(minutes * MINUTE * FPS, FPS, frames)
    readers = run_readers(folder, video, indices, rounds)
    memory = {seconds: peak_of_length(folder, minute, seconds, frames) for seconds in MEMORY_LENGTHS}
    size = video.stat().st_size
    if as_json:
        report = {"file": str(video), "bytes": size, "readers": readers, "peak_by_seconds": memory}
        click.echo(json.dumps(report))
        return
    title = f"{frames} frames of {minutes} minutes ({human_bytes(size)})"
    columns = ("reader", "seconds", "times ours", "the frames of a full decode", "peak")
    table(title, columns, _rows(readers, frames))
    peaks = [(f"{seconds} s", human_bytes(peak)) for seconds, peak in memory.items()]
    table("peak memory of the runtime's reader", ("video", "peak"), peaks)


def _rows(readers: dict[str, dict[str, Any] | str], frames: int) -> list[tuple[str, ...]]:
    ours = readers["ours"]
    rows: list[tuple[str, ...]] = []
    for name, result in readers.items():
        if isinstance(result, str):
            rows.append((name, "-", result, "", ""))
            continue
        ratio = "" if isinstance(ours, str) else f"{result['seconds'] / ours['seconds']:.2f}"
        same = f"{result['same']} of {frames}" + (", bit for bit" if result["equal"] else "")
        rows.append((name, f"{result['seconds']:.2f}", ratio, same, human_bytes(result["peak"])))
    return rows


if __name__ == "__main__":
    main()
