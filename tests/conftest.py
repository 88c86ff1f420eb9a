"""Shared fixtures: the golden data, small bundles, and one real video."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from helpers.commands import GOLDEN, run_command

settings.register_profile(
    "repeatable", derandomize=True
)  # a check must say the same twice; at home every run tries new examples
if os.environ.get("CI"):
    settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with tokenizers, in upstream's layout."""
    from ppllava_edge.bench.models.random_checkpoint import TINY, write_random_checkpoint

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_random_checkpoint(folder, TINY)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Path:
    """That checkpoint, exported in fp32."""
    output = tiny_checkpoint.parent / "bundle"
    run = run_command("ppllava-export", tiny_checkpoint, "-o", output, "--precision", "fp32")
    assert run.returncode == 0, run.stderr
    return output


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vicuna_tiny_bt, exported in fp32 without tokenizers."""
    output = tmp_path_factory.mktemp("golden") / "bundle"
    run = run_command(
        "ppllava-export", GOLDEN / "vicuna_tiny_bt", "-o", output, "--precision", "fp32", "--no-tokenizer"
    )
    assert run.returncode == 0, run.stderr
    return output


@pytest.fixture(scope="session")
def moving_frames() -> np.ndarray:
    """(24, 96, 128, 3) uint8: every frame has a grey level of its own, so that a frame can be told from its content."""
    frames = np.zeros((24, 96, 128, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:] = 20 + 9 * i
        frame[20:50, 4 * i : 4 * i + 24] = (200, 40, 40)
    return frames


@pytest.fixture(scope="session")
def video_file(tmp_path_factory: pytest.TempPathFactory, moving_frames: np.ndarray) -> Path:
    """Those frames as H.264 in MP4, 12 frames a second."""
    from ppllava_edge.runtime.media.writing import write_video

    return write_video(
        tmp_path_factory.mktemp("video") / "moving.mp4", moving_frames, fps=12, options={"crf": "10"}
    )
