"""Calibration data for nano: clips of nano's world."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from ppllava_edge.calibration.data import Data, video_clip
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.nano.clips import spoken, write_clip
from ppllava_edge.nano.world import KINDS, ask, sample_scene

CLIPS = 24
SEED = 8_128  # used for calibration only


def drawn(manifest: Manifest, folder: Path, count: int = CLIPS) -> Data:
    """Draw clips and write them as H.264 files, with questions that fit the scenes, and their answers.

    Args:
        manifest: Manifest of the float model.
        folder: Folder for the files.
        count: How many clips.
    """
    rng = np.random.default_rng(SEED)
    clips = []
    for index in range(count):
        scene = sample_scene(rng)
        path = write_clip(folder / f"drawn-{index:02d}.mp4", scene, rng)
        asked = [found for kind in KINDS if (found := ask(scene, kind, rng)) is not None]
        questions = [(spoken(question), answer) for question, answer in asked]
        clips.append(video_clip(path, manifest.vision.default_frames, manifest, questions))
    data = Data(clips, hashlib.sha256(f"nano {count} {SEED}".encode()).hexdigest())
    data.hold_back()
    return data
