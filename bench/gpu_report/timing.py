"""Timing torch's stream on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

WARMUP = 5  # runs


def median_seconds(torch: Any, run: Callable[[int], Any], runs: int = 50) -> float:
    """Median seconds of a run, timed by events on the device.

    Args:
        torch: The module.
        run: Called with its number, so that inputs can rotate.
        runs: Timed runs.
    """
    for i in range(WARMUP):
        run(i)
    times = []
    for i in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth(torch: Any, size: int = 1 << 30) -> float:
    """Bytes per second of a copy of `size` bytes on the device, read and write counted."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    return 2 * size / median_seconds(torch, lambda i: target.copy_(source))
