"""Making items in a thread of their own, a few ahead of who takes them: frames are decoded while the engine encodes the ones before."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar, cast

T = TypeVar("T")
_END = object()


def prefetch(items: Iterator[T], depth: int = 8) -> Generator[T, None, None]:
    """The same items; at most `depth` wait. An error in the thread is raised here. Closing the generator ends the thread before it returns."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: object) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:
            put((_END, error))
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, name="ppllava-frames", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield cast(T, item)
    finally:
        closed.set()
        thread.join()
