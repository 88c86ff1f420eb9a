"""Progress of an export: the callbacks, and the bar that the command line draws."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """Callbacks of an export and a calibration. This base class ignores them."""

    def start(self, total_bytes: int) -> None:
        """The checkpoint is complete, and this many bytes of weights will be written."""

    def stage(self, name: str) -> None:
        """The writing of a stage begins."""

    def wrote(self, count: int) -> None:
        """This many more bytes of weights were written."""

    def step(self, what: str, done: int, of: int) -> None:
        """A part of a calibration or of an engine build advanced."""


class ProgressBar(Progress):
    """A progress bar over the bytes written, on stderr; nothing if stderr is not a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description:12s}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self._bar = RichProgress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("reading", total=None)
        self._steps: dict[str, Any] = {}

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, total_bytes: int) -> None:
        """Set the total."""
        self._bar.update(self._task, total=total_bytes)

    def stage(self, name: str) -> None:
        """Show the name of the stage."""
        self._bar.update(self._task, description=name)

    def wrote(self, count: int) -> None:
        """Advance the bar."""
        self._bar.advance(self._task, count)

    def step(self, what: str, done: int, of: int) -> None:
        """Show a separate bar for this part."""
        if what not in self._steps:
            self._steps[what] = self._bar.add_task(what, total=of)
        self._bar.update(self._steps[what], completed=done, total=of)
