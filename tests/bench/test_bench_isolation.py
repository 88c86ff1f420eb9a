"""What isolation costs is measured: all figures are there and plausible."""

from __future__ import annotations

import json
import subprocess
import sys

from helpers.commands import SAMPLE


def test_the_figures_of_one_video() -> None:
    command = [sys.executable, "-m", "ppllava_edge.bench.isolation", str(SAMPLE), "--frames", "4", "--json"]
    run = subprocess.run([*command, "--rounds", "2"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(run.stdout).values()
    assert row["open_isolated"] > row["open"] > 0 and row["read_isolated"] > 0 and row["read"] > 0
    assert row["frame_mb"] == 216 * 216 * 3 / 10**6
    assert 20 < row["child_mb"] <= row["child_peak_mb"] < 1000
