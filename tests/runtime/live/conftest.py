"""Fixtures of the live tests: the demonstration model, its sample's frames, short pauses."""

from __future__ import annotations

from typing import Any

import av
import numpy as np
import pytest

from helpers.commands import SAMPLE
from ppllava_edge import VideoQA
from ppllava_edge.runtime.live import reconnect


@pytest.fixture(scope="module")
def qa() -> VideoQA:
    return VideoQA(device="cpu")


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    with av.open(str(SAMPLE)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnect, "BACK_OFF", (0.05, 0.1, 0.2))


@pytest.fixture
def pushed(qa: VideoQA, frames: np.ndarray) -> Any:
    with qa.live(fps=4, window=16) as live:
        for i in range(0, 40, 5):
            live.push(frames[i], i / 20, wait=True)
        live.wait_for(8, 20)
        yield live
