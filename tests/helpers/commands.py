"""Running the installed commands as a user would, and the paths that tests share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
SAMPLE = ROOT / "nano" / "sample" / "shapes.mp4"
GOLDEN = ROOT / "tests" / "golden"


def run_command(
    name: str, *arguments: object, stdin: str | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of the installed commands as a user would."""
    script = Path(sys.executable).with_name(name)
    return subprocess.run(
        [str(script), *map(str, arguments)], capture_output=True, text=True, input=stdin, cwd=cwd, timeout=300
    )


def assert_one_line_error(run: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2, one clear line on stderr that holds all words, nothing on stdout, no traceback."""
    assert run.returncode == 2, (run.returncode, run.stderr)
    assert "Traceback" not in run.stderr
    lines = [
        line
        for line in run.stderr.splitlines()
        if line and not line.startswith(("nano is a tiny", "Usage:", "Try "))
    ]
    assert len(lines) == 1, run.stderr
    assert lines[0].lower().startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]
    assert not run.stdout


def frame_number(image: np.ndarray) -> int:
    """The index in moving_frames of a decoded image, by the grey level in a corner."""
    return round((float(image[-20:, -20:].mean()) - 20) / 9)
