"""32 frames of an hour: seeking against decoding everything, beside OpenCV, decord and torchcodec, on one file, in one run.

    python -m ppllava_edge.bench.long_video FOLDER

makes FOLDER/hour.mp4 (one minute of 1080p H.264, encoded once and copied packet by packet 60 times) unless it is there. Every reader runs in a process of
its own; readers that aren't installed are left out (extra `peers`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.engines.machine.memory import peak_memory
from ppllava_edge.engines.terminal import Command, human_bytes, table
from ppllava_edge.runtime.media.writing import write_video

FPS, SIZE, MINUTE = 30, (1920, 1080), 60
SAME = 3.0  # mean difference in RGB below which two pictures are the same frame, converted by different libraries


def make_minute(path: Path) -> None:
    """A minute of camera-like 1080p: a textured scene that pans, sensor noise, a few things that move by themselves."""
    from PIL import Image

    rng = np.random.default_rng(7)
    width, height = SIZE
    coarse = rng.integers(0, 255, (height // 40 + 40, width // 40 + 80, 3), np.uint8)
    scene = np.asarray(
        Image.fromarray(coarse).resize((coarse.shape[1] * 40, coarse.shape[0] * 40), Image.Resampling.BICUBIC)
    )
    noise = rng.normal(0, 3, (8, height, width, 1)).astype(np.int16)

    def frames() -> Iterator[np.ndarray]:
        for i in range(FPS * MINUTE):
            x, y = round(600 + 500 * np.sin(i / 200)), round(300 + 200 * np.sin(i / 330))
            image = (
                (scene[y : y + height, x : x + width].astype(np.int16) * 3 // 4 + noise[i % 8] + 16)
                .clip(0, 255)
                .astype(np.uint8)
            )
            for k in range(4):
                left, top = (i * (3 + k) + 400 * k) % (width - 120), (200 * k + i * 2) % (height - 120)
                image[top : top + 90, left : left + 90] = (60 * k + 40, 200 - 40 * k, (i * 3) % 255)
            yield image

    write_video(path, frames(), FPS, options={"crf": "25", "preset": "veryfast"})


def repeat(minute: Path, target: Path, seconds: float) -> None:
    """Copy a file's packets one after another until so many seconds are full."""
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
                        packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, out
                        container.mux(packet)
                offset += length
    part.replace(target)


def ours(path: Path, indices: list[int]) -> list[np.ndarray]:
    """The runtime: from key frame to key frame."""
    from ppllava_edge.runtime.media.readers import VideoReader

    return [frame.image for frame in VideoReader(path).frames(lambda reader: indices)]


def ours_sequential(path: Path, indices: list[int]) -> list[np.ndarray]:
    """The runtime before it could seek: a PyAV decode up to the last wanted frame."""
    from ppllava_edge.runtime.media.readers import VideoReader

    return [frame.image for frame in VideoReader(path, seeking=False).frames(lambda reader: indices)]


def opencv_sequential(path: Path, indices: list[int]) -> list[np.ndarray]:
    """OpenCV, grabbing every frame, retrieving the wanted ones."""
    import cv2

    capture, found, wanted = cv2.VideoCapture(str(path)), [], set(indices)
    for i in range(max(indices) + 1):
        capture.grab()
        if i in wanted:
            found.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    return found


def opencv_seeking(path: Path, indices: list[int]) -> list[np.ndarray]:
    """OpenCV, setting the position."""
    import cv2

    capture, found = cv2.VideoCapture(str(path)), []
    for i in indices:
        capture.set(cv2.CAP_PROP_POS_FRAMES, i)
        found.append(cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB))
    return found


def decord(path: Path, indices: list[int]) -> list[np.ndarray]:
    """decord's get_batch."""
    import decord as library

    return list(library.VideoReader(str(path)).get_batch(indices).asnumpy())


def torchcodec_exact(path: Path, indices: list[int]) -> list[np.ndarray]:
    """torchcodec, scanning the file first."""
    from torchcodec.decoders import VideoDecoder

    return list(
        VideoDecoder(str(path), seek_mode="exact", dimension_order="NHWC", num_ffmpeg_threads=0)
        .get_frames_at(indices)
        .data.numpy()
    )


def torchcodec_approximate(path: Path, indices: list[int]) -> list[np.ndarray]:
    """torchcodec, trusting the header."""
    from torchcodec.decoders import VideoDecoder

    return list(
        VideoDecoder(str(path), seek_mode="approximate", dimension_order="NHWC", num_ffmpeg_threads=0)
        .get_frames_at(indices)
        .data.numpy()
    )


READERS: dict[str, Callable[[Path, list[int]], list[np.ndarray]]] = {
    "ours": ours,
    "decord": decord,
    "torchcodec, exact": torchcodec_exact,
    "torchcodec, approximate": torchcodec_approximate,
    "OpenCV, seeking": opencv_seeking,
    "OpenCV, sequential": opencv_sequential,
    "PyAV, sequential": ours_sequential,
}
SEQUENTIAL = ("OpenCV, sequential", "PyAV, sequential")


def measure(name: str, path: Path, indices: list[int], keep: Path) -> dict[str, Any]:
    """One reader in this process: seconds and peak memory; the frames go to a file."""
    from importlib import import_module

    for module in {
        "torchcodec": ["torch", "torchcodec.decoders"],
        "OpenCV": ["cv2"],
        "decord": ["decord"],
    }.get(name.split(",")[0], ["av"]):
        import_module(module)  # not part of the time
    started = time.perf_counter()
    images = READERS[name](path, indices)
    seconds = time.perf_counter() - started
    np.save(keep, np.stack([image[::4, ::4] for image in images]))
    return {"seconds": seconds, "peak": peak_memory(), "frames": len(images)}


def in_process(name: str, path: Path, indices: list[int], keep: Path) -> dict[str, Any] | str:
    """The same in a process of its own, or why not."""
    code = (
        "import json, sys; from pathlib import Path; from ppllava_edge.bench.long_video import measure; "
        "print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4]))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, name, str(path), json.dumps(indices), str(keep)],
        capture_output=True,
        text=True,
    )
    if run.returncode:
        return run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "failed"
    return dict(json.loads(run.stdout.splitlines()[-1]))


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--frames", type=click.IntRange(1, 1000), default=32, show_default=True)
@click.option("--minutes", type=click.IntRange(1, 600), default=60, show_default=True)
@click.option(
    "--rounds",
    type=click.IntRange(1, 20),
    default=2,
    show_default=True,
    help="Of the readers that seek, in turns; the best counts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(folder: Path, frames: int, minutes: int, rounds: int, as_json: bool) -> None:
    """Time every reader that is installed on one long file, check that the frames are the same, and the runtime's memory from 10 s to 2 h."""
    from ppllava_edge.runtime.vision.frame_choice import sample_indices

    folder.mkdir(parents=True, exist_ok=True)
    minute, long = folder / "minute.mp4", folder / f"{minutes}-minutes.mp4"
    if not minute.exists():
        make_minute(minute)
    if not long.exists():
        repeat(minute, long, minutes * MINUTE)
    indices = sample_indices(minutes * MINUTE * FPS, FPS, frames)
    found: dict[str, Any] = {}
    for number in range(rounds):
        for name in READERS:
            if number and (name in SEQUENTIAL or isinstance(found[name], str)):
                continue
            result = in_process(name, long, indices, folder / f"{name}.npy")
            if number == 0 or (not isinstance(result, str) and result["seconds"] < found[name]["seconds"]):
                found[name] = result
            print(f"{name}: {result}", file=sys.stderr)
    reference = np.load(folder / "PyAV, sequential.npy").astype(np.int16)
    for name, result in found.items():
        if not isinstance(result, str):
            difference = np.abs(np.load(folder / f"{name}.npy").astype(np.int16) - reference)
            result["same"] = int((difference.mean((1, 2, 3)) < SAME).sum())
            result["equal"] = bool((difference == 0).all())
    memory = {seconds: _peak(folder, minute, seconds, frames) for seconds in (10, 60, 3600, 7200)}
    if as_json:
        click.echo(
            json.dumps(
                {"file": str(long), "bytes": long.stat().st_size, "readers": found, "peak_by_seconds": memory}
            )
        )
        return
    mine = found["ours"]["seconds"]

    def row(name: str, r: Any) -> tuple[str, ...]:
        if isinstance(r, str):
            return name, "-", r, "", ""
        frames_of_a_full_decode = f"{r['same']} of {frames}" + (", bit for bit" if r["equal"] else "")
        return (
            name,
            f"{r['seconds']:.2f}",
            f"{r['seconds'] / mine:.2f}",
            frames_of_a_full_decode,
            human_bytes(r["peak"]),
        )

    title = f"{frames} frames of {minutes} minutes ({human_bytes(long.stat().st_size)})"
    table(
        title,
        ("reader", "seconds", "times ours", "the frames of a full decode", "peak"),
        [row(name, r) for name, r in found.items()],
    )
    table(
        "peak memory of the runtime's reader",
        ("video", "peak"),
        [(f"{seconds} s", human_bytes(peak)) for seconds, peak in memory.items()],
    )


def _peak(folder: Path, minute: Path, seconds: int, frames: int) -> float:
    from ppllava_edge.runtime.vision.frame_choice import sample_indices

    path = folder / f"{seconds}-seconds.mp4"
    if not path.exists():
        repeat(minute, path, seconds)
    result = in_process("ours", path, sample_indices(seconds * FPS, FPS, frames), folder / "memory.npy")
    assert not isinstance(result, str), result
    return float(result["peak"])


if __name__ == "__main__":
    main()
