"""The progress callback of engine builds."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # name of the graph, graphs done, graphs in all


def no_progress(name: str, done: int, total: int) -> None:
    """The default callback; does nothing."""
