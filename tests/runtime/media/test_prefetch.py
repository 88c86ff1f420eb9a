"""Prefetching: the same items and errors, and a thread that ends with its consumer."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from ppllava_edge.runtime.media.prefetch import prefetch


def test_prefetching_gives_the_same_items_and_errors() -> None:
    assert list(prefetch(iter(range(100)), 3)) == list(range(100))

    def breaks() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    items = prefetch(breaks(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)


def test_prefetching_stops_its_thread_when_it_is_closed() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    items = prefetch(endless(), 2)
    next(items)
    items.close()
    assert closed.is_set() and not any(t.name == "ppllava-frames" for t in threading.enumerate())
