"""The progress callback of engine builds."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # name of the graph, graphs done, of how many


def no_progress(name: str, done: int, total: int) -> None:
    """The default callback; does nothing."""
