"""Fixtures of the calibration tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppllava_edge.runtime.media.writing import write_video


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory, moving_frames: np.ndarray) -> Path:
    """A folder with three small videos and a file that is not a video."""
    folder = tmp_path_factory.mktemp("clips")
    for k in range(3):
        write_video(folder / f"{k}.mp4", np.roll(moving_frames, 9 * k, axis=2), fps=12)
    (folder / "notes.txt").write_text("not a video")
    return folder
