"""Which lines of the package an input reaches: the signal by which the corpus grows.

Only the package's own Python is seen. FFmpeg, Pillow and ONNX Runtime come as wheels without
instrumentation; the messages that FFmpeg logs stand in for its coverage.
"""

from __future__ import annotations

import sys
import threading
import zlib
from pathlib import Path
from types import FrameType
from typing import Any

import ppllava_edge.engines
import ppllava_edge.export
import ppllava_edge.runtime

ROOTS = tuple(
    str(Path(str(package.__file__)).parent)
    for package in (ppllava_edge.engines, ppllava_edge.export, ppllava_edge.runtime)
)


class LineCoverage:
    """Collects the lines that run, in all threads that begin after `start`."""

    def __init__(self) -> None:
        self._lines: set[tuple[str, int]] = set()
        self._wanted: dict[str, bool] = {}

    def start(self) -> None:
        """Begin to collect."""
        threading.settrace(self._enter)
        sys.settrace(self._enter)

    def stop(self) -> None:
        """Stop collecting in this thread and in new ones."""
        sys.settrace(None)
        threading.settrace(None)

    def features(self) -> list[int]:
        """A number for every line that ran."""
        return [zlib.crc32(f"{file}:{line}".encode()) for file, line in self._lines.copy()]

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if file not in self._wanted:
            self._wanted[file] = file.startswith(ROOTS)
        return self._line if self._wanted[file] else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self._lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line
