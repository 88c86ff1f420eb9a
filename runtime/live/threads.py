"""The threads of a live view, and the app's callbacks that run in them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Worker(threading.Thread):
    """A thread of a live view, or of one of its watches. A daemon: it doesn't keep the process alive.

    Args:
        run: What it does.
        name: Its name.
    """

    def __init__(self, run: Callable[[], None], name: str):
        super().__init__(target=run, name=name, daemon=True)

    def wait_for_end(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, at most `timeout` seconds.

        Returns at once in any Worker: there it is called from a callback, and two callbacks that waited for
        each other's thread would wait for ever.
        """
        if self.ident is not None and not isinstance(threading.current_thread(), Worker):
            self.join(timeout)


def call_app(name: str, callback: Callable[..., Any], *args: Any) -> None:
    """Call a callback of the app. What it raises is logged, sys.exit included: our threads go on."""
    try:
        callback(*args)
    except KeyboardInterrupt:  # only in the main thread, where the app called us
        raise
    except BaseException:
        log.exception("the %s callback failed", name)


def one_line(error: BaseException) -> str:
    """An error's message, or its type, in one line of at most 300 characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
