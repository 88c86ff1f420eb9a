"""Calls of the app's callbacks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


def call_app(name: str, callback: Callable[..., Any], *args: Any) -> None:
    """Call a callback of the app. What it raises is logged, sys.exit included: our threads go on."""
    try:
        callback(*args)
    except BaseException as error:
        # Ctrl-C in the main thread, where the app called us, is not the callback's own.
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        log.exception("the %s callback failed", name)
