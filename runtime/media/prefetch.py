"""Produce items in a background thread, ahead of the consumer: decoding runs while the engine encodes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar, cast

T = TypeVar("T")
_END = object()


def prefetch(items: Iterator[T], depth: int = 8) -> Generator[T, None, None]:
    """Run an iterator in a background thread.

    Closing the generator stops the thread and waits for it.

    Args:
        items: Consumed, and closed if it is a generator, in the thread.
        depth: The largest number of finished items that wait for the consumer.

    Yields:
        The same items, in order.

    Raises:
        BaseException: Whatever the iterator raised.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)  # (item, error)
    closed = threading.Event()
    thread = threading.Thread(
        target=_produce, args=(items, ready, closed), name="ppllava-frames", daemon=True
    )
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


def _produce(items: Iterator[Any], ready: queue.Queue[Any], closed: threading.Event) -> None:
    """Put every item into the queue, then _END or the iterator's error, until the consumer closes."""
    try:
        for item in items:
            if not _put((item, None), ready, closed):
                return
        _put((_END, None), ready, closed)
    except BaseException as error:
        _put((_END, error), ready, closed)
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()


def _put(item: object, ready: queue.Queue[Any], closed: threading.Event) -> bool:
    """Wait for space in the queue. Returns False if the consumer closed first."""
    while not closed.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
