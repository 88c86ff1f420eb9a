"""Scenes of nano's world as real video files."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from .world import STEPS, Scene, draw

FILE_FRAMES, FILE_FPS, FILE_SIDE = 40, 20, 216  # five frames a step, two seconds, twice the size that the model sees


def clip_frames(scene: Scene, rng: np.random.Generator, side: int = FILE_SIDE, frames: int = FILE_FRAMES) -> np.ndarray:
    """(frames, side, side, 3) uint8."""
    return draw(scene, np.arange(frames) * STEPS / frames, rng, side)[0]


def write_video(path: str | os.PathLike[str], frames: np.ndarray, fps: int = FILE_FPS, codec: str = "libx264", options: dict[str, str] | None = None) -> Path:
    """Encode (T,H,W,3) uint8 frames; the container follows the file's suffix. H.264 at quality 20 unless told otherwise."""
    import av

    path = Path(path)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = options if options is not None else ({"crf": "20", "preset": "veryfast"} if codec == "libx264" else {})
        for image in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_clip(path: str | os.PathLike[str], scene: Scene, rng: np.random.Generator) -> Path:
    """Draw a scene and encode it to H.264."""
    return write_video(path, clip_frames(scene, rng))


def spoken(words: str) -> str:
    """A question as a person would type it: "What color is the circle?" """
    text = words.replace(" ?", "?").replace(" .", ".")
    return text[:1].upper() + text[1:]
