"""The threads of a live view."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Worker(threading.Thread):
    """A thread of a live view, or of one of its watches. A daemon: it doesn't keep the process alive.

    Args:
        run: What it does.
        name: Its name.
    """

    def __init__(self, run: Callable[[], None], name: str):
        super().__init__(target=run, name=name, daemon=True)

    def wait_for_end(self, until: float | None = None) -> None:
        """Wait until the thread has ended, at most until then, by time.monotonic(); None: no limit.

        Returns at once in any Worker: there it is called from a callback, and two callbacks that waited for
        each other's thread would wait for ever.
        """
        if self.ident is not None and not isinstance(threading.current_thread(), Worker):
            self.join(None if until is None else max(until - time.monotonic(), 0))


def one_line(error: BaseException) -> str:
    """An error's message, or its type, in one line of at most 300 characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
