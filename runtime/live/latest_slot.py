"""A slot for one item between two threads, in which the newest item replaces an older one."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class LatestSlot(Generic[T]):
    """A queue of length one: the producer doesn't block, the consumer gets the newest item.

    Attributes:
        put_in: Items put in so far.
        dropped: Items that were replaced before they were taken.
    """

    def __init__(self) -> None:
        self.put_in = self.dropped = 0
        self._item: deque[T] = deque(maxlen=1)
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T, wait: bool = False) -> bool:
        """Put an item in.

        Args:
            item: The item.
            wait: Block until the previous item was taken, instead of replacing it.

        Returns:
            Whether the slot took it: not once it is closed.
        """
        with self._changed:
            while wait and self._item and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            self.put_in += 1
            self.dropped += len(self._item)
            self._item.append(item)
            self._changed.notify_all()
            return True

    def take(self) -> T | None:
        """Block until there is an item and take it; None when the slot is closed."""
        with self._changed:
            while not self._item and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            item = self._item.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Drop the item and wake all waiting threads."""
        with self._changed:
            self._closed = True
            self.dropped += len(self._item)
            self._item.clear()
            self._changed.notify_all()
