"""Checks that need an installed copy of the package: types (mypy) and import contracts (import-linter).

In the source tree the package's name belongs to no folder, so both would see an almost empty package there. A
wheel install shows them every file; their counts are checked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("api", "engines", "export", "calibration", "runtime", "bench", "nano")
PYPROJECT = ROOT / "pyproject.toml"


def run(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a command in a folder that holds the installed package. Returns its exit status and output."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def checked_all(output: str, pattern: str, files: int, libraries: bool = False) -> bool:
    """Whether a tool says that it checked this many files, or more if it counts libraries too."""
    seen = re.search(pattern, output)
    if seen and (int(seen[1]) == files or (libraries and int(seen[1]) > files)):
        return True
    print(f"{seen[1] if seen else 'no'} files were checked, there are {files}")
    return False


def main() -> int:
    files = sum(len(list((ROOT / folder).rglob("*.py"))) for folder in FOLDERS)
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack files that are gone since
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", scratch, str(ROOT)], check=True)
        types = [sys.executable, "-m", "mypy", "--config-file", str(PYPROJECT), "ppllava_edge"]
        types_status, types_output = run(types, folder)
        contracts = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
        arguments = ["--config", str(PYPROJECT), "--no-cache"]
        imports_status, imports_output = run([*contracts, *arguments], folder)
    print(types_output, imports_output)
    all_seen = checked_all(types_output, r"(?:in|checked) (\d+) source files?", files)
    all_seen &= checked_all(imports_output, r"Analyzed (\d+) files", files, libraries=True)
    return types_status or imports_status or (0 if all_seen else 1)


if __name__ == "__main__":
    sys.exit(main())
