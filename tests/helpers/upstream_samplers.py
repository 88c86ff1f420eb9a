"""Upstream's other frame samplers, which the runtime doesn't use; checked against golden data."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def frames_for_duration(seconds_per_frame: float, duration: float) -> int:
    """32 frames, or 64 for clips of more than 32 steps (upstream's negative num_segments)."""
    return 32 if duration / seconds_per_frame <= 32 else 64


def centred_indices(total: int, frames: int) -> list[int]:
    """The centre of each of `frames` equal segments of total-1 (upstream's get_seq_frames)."""
    size = float(total - 1) / frames
    return [(int(np.round(size * i)) + int(np.round(size * (i + 1)))) // 2 for i in range(frames)]


def middle_indices(frames: int, count: int) -> list[int]:
    """The middle of `frames` intervals over `count` frames, padded with the last one.

    Upstream's get_frame_indices, mode "middle".
    """
    used = min(frames, count)
    edges = np.linspace(start=0, stop=count, num=used + 1).astype(int)
    indices = [(int(low) + int(high) - 1) // 2 for low, high in pairwise(edges)]
    return indices + [indices[-1]] * (frames - len(indices))


def indices_at_rate(rate: float, count: int, fps: float, limit: int = -1) -> list[int]:
    """One frame every 1/rate seconds, each in the middle of its step; the first `limit` of them, if above 0.

    Upstream's get_frame_indices, mode "fpsX".
    """
    duration, step = float(count) / fps, 1 / rate
    seconds = np.arange(0 + step / 2, duration + step / 2, step)
    indices = [int(i) for i in np.around(seconds * fps).astype(int) if i < count]
    return indices[:limit] if limit > 0 else indices
