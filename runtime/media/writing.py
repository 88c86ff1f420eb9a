"""Write frames to a video file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

DEFAULT_FPS = 20
X264_OPTIONS = {"crf": "20", "preset": "veryfast"}


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    fps: int | Fraction = DEFAULT_FPS,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
) -> Path:
    """Encode frames as they come.

    Args:
        path: The file; its suffix sets the container format.
        frames: RGB uint8 (H, W, 3), at least one, all of one size.
        fps: Frames per second.
        codec: FFmpeg's name of the encoder.
        options: The encoder's options; by default H.264 at quality 20, none for another codec.

    Returns:
        The path.
    """
    import av

    path = Path(path)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps))
        stream.pix_fmt = "yuv420p"
        if options is None:
            options = X264_OPTIONS if codec == "libx264" else {}
        stream.options = options
        for i, image in enumerate(frames):
            if i == 0:
                stream.height, stream.width = image.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
