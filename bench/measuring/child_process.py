"""Measurements in a process of their own, so that one's memory and caches don't change another's figures."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from ppllava_edge.engines.errors import PPLLaVAError


def run_json(command: list[str], show_errors: bool = False) -> dict[str, Any]:
    """Run a command that prints JSON as its last line.

    Args:
        command: The program and its arguments.
        show_errors: Pass its stderr through, for commands that show their progress there.

    Returns:
        The JSON object.

    Raises:
        PPLLaVAError: In one line, if it fails.
    """
    run = run_command(command, show_errors)
    return dict(json.loads(run.stdout.strip().splitlines()[-1]))


def run_command(command: list[str], show_errors: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its stdout. Raises PPLLaVAError with the last line of stderr if it fails."""
    stderr = None if show_errors else subprocess.PIPE
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    if run.returncode:
        reason = last_line(run.stderr or "") or f"exit status {run.returncode}"
        raise PPLLaVAError(f"{' '.join(command[:3])} failed: {reason}")
    return run


def last_line(text: str) -> str:
    """The last line that isn't empty: of a traceback, the exception. "" if there is none."""
    return (text.strip().splitlines() or [""])[-1]
