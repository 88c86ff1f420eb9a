"""Writing frames to a video file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

DEFAULT_FPS = 20


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    fps: int | Fraction = DEFAULT_FPS,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
) -> Path:
    """Encode RGB uint8 frames (H,W,3) of one size, at least one, as they come; the container follows the file's suffix. H.264 at quality 20 unless told
    otherwise."""
    import av

    path = Path(path)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps))
        stream.pix_fmt = "yuv420p"
        stream.options = (
            options
            if options is not None
            else ({"crf": "20", "preset": "veryfast"} if codec == "libx264" else {})
        )
        for i, image in enumerate(frames):
            if i == 0:
                stream.height, stream.width = image.shape[:2]
            for packet in stream.encode(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            ):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
