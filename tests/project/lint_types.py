"""Run mypy over a wheel install of the package, and make sure that it saw every file."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLUGINS = ("engines/plugins", "engines/plugins/weighted_pool", "engines/plugins/prepare_frame")
FOLDERS = ("api", "engines", *PLUGINS, "export", "calibration", "runtime", "bench", "nano")


def main() -> int:
    files = sum(len(list((ROOT / folder).glob("*.py"))) for folder in FOLDERS)
    with tempfile.TemporaryDirectory() as scratch:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--target",
            scratch,
            str(ROOT),
        ]
        subprocess.run(pip, check=True)
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "ppllava_edge",
        ]
        run = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    seen = re.search(r"(?:in|checked) (\d+) source files?", run.stdout)
    if run.returncode == 0 and (not seen or int(seen[1]) != files):
        print(f"mypy saw {seen[1] if seen else 'no'} files, there are {files}")
        return 1
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
