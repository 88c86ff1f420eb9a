"""Frames of a long video by their indices, with every reader that is installed (extra `peers`).

python -m ppllava_edge.bench.peers.video_readers NAME VIDEO INDICES FRAMES.npy   # indices: a JSON list

A reader takes a path and frame indices, and returns RGB uint8 frames (H, W, 3).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.machine.memory import peak_memory
from ppllava_edge.runtime.media.readers import VideoReader


def ours(path: Path, indices: list[int]) -> list[np.ndarray]:
    """The runtime's reader, seeking from key frame to key frame."""
    return [frame.image for frame in VideoReader(path).frames(lambda reader: indices)]


def ours_sequential(path: Path, indices: list[int]) -> list[np.ndarray]:
    """The runtime's reader without seeking: PyAV decodes everything up to the last index."""
    return [frame.image for frame in VideoReader(path, seeking=False).frames(lambda reader: indices)]


def opencv_sequential(path: Path, indices: list[int]) -> list[np.ndarray]:
    """OpenCV: grab every frame, retrieve those at the indices."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    images, wanted = list[np.ndarray](), set(indices)
    for i in range(max(indices) + 1):
        capture.grab()
        if i in wanted:
            images.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    return images


def opencv_seeking(path: Path, indices: list[int]) -> list[np.ndarray]:
    """OpenCV: set the position before every frame."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    images = list[np.ndarray]()
    for i in indices:
        capture.set(cv2.CAP_PROP_POS_FRAMES, i)
        images.append(cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB))
    return images


def decord(path: Path, indices: list[int]) -> list[np.ndarray]:
    """decord's get_batch."""
    import decord as library

    return list(library.VideoReader(str(path)).get_batch(indices).asnumpy())


def torchcodec_exact(path: Path, indices: list[int]) -> list[np.ndarray]:
    """torchcodec, which scans the whole file first."""
    return _torchcodec(path, indices, "exact")


def torchcodec_approximate(path: Path, indices: list[int]) -> list[np.ndarray]:
    """torchcodec, which trusts the header."""
    return _torchcodec(path, indices, "approximate")


def _torchcodec(path: Path, indices: list[int], seek_mode: str) -> list[np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), seek_mode=seek_mode, dimension_order="NHWC", num_ffmpeg_threads=0)
    return list(decoder.get_frames_at(indices).data.numpy())


READERS: dict[str, Callable[[Path, list[int]], list[np.ndarray]]] = {
    "ours": ours,
    "decord": decord,
    "torchcodec, exact": torchcodec_exact,
    "torchcodec, approximate": torchcodec_approximate,
    "OpenCV, seeking": opencv_seeking,
    "OpenCV, sequential": opencv_sequential,
    "PyAV, sequential": ours_sequential,
}
MODULES = {
    "torchcodec": ("torch", "torchcodec.decoders"),
    "OpenCV": ("cv2",),
    "decord": ("decord",),
}


def measure(name: str, path: Path, indices: list[int], output: Path) -> dict[str, Any]:
    """Read frames with one reader, in this process.

    Args:
        name: One of READERS.
        path: The video.
        indices: Frames to read.
        output: Where the frames go, at a quarter of their size (.npy).

    Returns:
        "seconds", "peak" (memory, bytes), "frames" (count).
    """
    for module in MODULES.get(name.split(",")[0], ("av",)):
        import_module(module)  # before the clock starts
    started = time.perf_counter()
    images = READERS[name](path, indices)
    seconds = time.perf_counter() - started
    np.save(output, np.stack([image[::4, ::4] for image in images]))
    return {"seconds": seconds, "peak": peak_memory(), "frames": len(images)}


if __name__ == "__main__":
    reader_name, video, indices_json, frames_file = sys.argv[1:]
    print(json.dumps(measure(reader_name, Path(video), json.loads(indices_json), Path(frames_file))))
