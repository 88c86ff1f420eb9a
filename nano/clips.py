"""Scenes of nano's world as video files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from ppllava_edge.nano.world import (
    BRIEF,
    COLOR_NAMES,
    SHAPE_NAMES,
    SPEED,
    STEPS,
    STILL,
    VELOCITY,
    Scene,
    draw,
)
from ppllava_edge.runtime.media.writing import write_video

FILE_FRAMES = 40  # five per step
FILE_FPS = 20
FILE_SIDE = 216  # pixels, twice what the model sees


def clip_frames(
    scene: Scene, rng: np.random.Generator, side: int = FILE_SIDE, frames: int = FILE_FRAMES
) -> np.ndarray:
    """Draw a scene: (frames, side, side, 3) uint8."""
    return draw(scene, np.arange(frames) * STEPS / frames, rng, side)[0]


def write_clip(path: str | os.PathLike[str], scene: Scene, rng: np.random.Generator) -> Path:
    """Draw a scene and encode it as H.264."""
    return write_video(path, clip_frames(scene, rng), FILE_FPS)


def spoken(words: str) -> str:
    """A question as a person would type it: "What color is the circle?" """
    text = words.replace(" ?", "?").replace(" .", ".")
    return text[:1].upper() + text[1:]


def sample_scene_for_the_readme() -> Scene:
    """The scene of the packed sample clip.

    A red circle moves right, a blue square rests, a yellow cross appears briefly.
    """
    motions = np.array([1, STILL, BRIEF])
    return Scene(
        colors=np.array([COLOR_NAMES.index(c) for c in ("red", "blue", "yellow")]),
        shapes=np.array([SHAPE_NAMES.index(s) for s in ("circle", "square", "cross")]),
        motions=motions,
        radius=np.array([7.0, 7.0, 7.0], np.float32),
        start=np.array([(22, 30), (54, 84), (88, 58)], np.float32),
        velocity=VELOCITY[motions] * np.float32(sum(SPEED) / 2),
        appears=np.array([0, 0, 3], np.float32),
        vanishes=np.array([STEPS, STEPS, 5], np.float32),
        staggered=False,
        tint=np.zeros((3, 1), np.float32),
        background=(90.0, 12.0, -10.0),
    )


if __name__ == "__main__":
    write_clip(sys.argv[1], sample_scene_for_the_readme(), np.random.default_rng(1))
