"""The encoder thread: the newest frame wins, memory stays flat."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from helpers.stream_server import wait_until
from ppllava_edge import VideoQA


def test_a_slow_encoder_drops_frames_and_never_lags(
    qa: VideoQA, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with qa.live(fps=1000, window=16) as live:
        encode = qa.pipeline.encode_trunk

        def encode_slowly(pixels: Any, more: bool = False) -> Any:
            time.sleep(0.03)
            return encode(pixels)

        monkeypatch.setattr(qa.pipeline, "encode_trunk", encode_slowly)
        lags = []
        for i in range(200):
            live.push(frames[i % 40], i / 200)
            time.sleep(0.003)
            lags.append(live.status.lag)
        s = live.status
        assert s.dropped > 50 and s.encoded + s.dropped <= s.seen == 200
        assert max(lags) < 1.0, "a queue would have grown to seconds"
        newest = live.window.frames()[-1].seconds
        assert wait_until(lambda: live.window.frames()[-1].seconds >= newest)


def test_an_hour_of_frames_at_speed_leaves_memory_flat() -> None:
    from ppllava_edge.bench.live_soak import soak

    found = soak(frames=3600 * 30, fps=2, rate=30, window=32, model=None, ask_every=20_000)
    samples = found["samples"]
    memory = np.array([s["memory"] for s in samples])
    early, late = memory[len(memory) // 4 : len(memory) // 2].mean(), memory[-len(memory) // 4 :].mean()
    assert late - early < 30e6, (early, late)
    assert found["encoded"] + found["dropped"] <= 7201 and found["asked"] == found["right"] == 5
    assert max(s["kept"] for s in samples) <= 32 and samples[-1]["lag"] < 2
