"""Measurements in separate processes, so that memory and caches of one don't change another's figures."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from ppllava_edge.engines.errors import PPLLaVAError


class ChildError(PPLLaVAError):
    """A command that failed.

    Attributes:
        reason: The last line of its stderr, or its exit status.
    """

    def __init__(self, command: list[str], reason: str):
        super().__init__(f"{' '.join(command[:3])} failed: {reason}")
        self.reason = reason


def run_json(command: list[str], show_errors: bool = False) -> dict[str, Any]:
    """Run a command that prints a JSON object as its last line.

    Args:
        command: The program and its arguments.
        show_errors: Pass its stderr through, for commands that show their progress there.

    Returns:
        The JSON object.

    Raises:
        ChildError: If the command fails.
    """
    stderr = None if show_errors else subprocess.PIPE
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    if run.returncode:
        raise ChildError(command, last_line(run.stderr or "") or f"exit status {run.returncode}")
    return dict(json.loads(last_line(run.stdout)))


def run_shown(command: list[str]) -> None:
    """Run a command whose output goes to the terminal. Raises ChildError if it fails."""
    status = subprocess.run(command).returncode
    if status:
        raise ChildError(command, f"exit status {status}")


def last_line(text: str) -> str:
    """The last line that isn't empty: of a traceback, the exception. "" if there is none."""
    return (text.strip().splitlines() or [""])[-1]
