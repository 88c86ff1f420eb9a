"""What is built on first use: by one thread, however many ask for it at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
_UNBUILT: Any = object()


class locked_cached_property(cached_property[T]):
    """functools.cached_property with a lock per object; that one has none since Python 3.12.

    Without a lock, two threads that ask first at the same time both build the value. If building fails, the
    next use tries again. The method may use other such properties of the same object.
    """

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...

    def __get__(self, instance: object | None, owner: type | None = None) -> Any:
        """The value; once it is built, Python finds it in the object's __dict__ and doesn't come here."""
        if instance is None:
            return self
        name, values = str(self.attrname), instance.__dict__
        with values.setdefault(f"_lock_of_{name}", threading.RLock()):
            value = values.get(name, _UNBUILT)  # another thread may remove it at any time
            if value is _UNBUILT:
                value = values[name] = self.func(instance)
            return value


class LazyTable(Generic[T]):
    """Values by name, each built on first use under a lock of its own: slow ones don't delay others."""

    def __init__(self) -> None:
        self._values: dict[str, T] = {}
        self._locks: dict[str, threading.RLock] = {}

    def get(self, name: str, build: Callable[[], T]) -> T:
        """The value of a name.

        Args:
            name: Its name.
            build: Builds it if it isn't built yet. If that fails, the next use tries again.
        """
        value = self._values.get(name, _UNBUILT)  # without a lock: another value may be being built
        if value is _UNBUILT:
            with self._locks.setdefault(name, threading.RLock()):
                value = self._values.get(name, _UNBUILT)
                if value is _UNBUILT:
                    value = self._values[name] = build()
        return cast(T, value)

    def built(self) -> dict[str, T]:
        """The values so far, by name."""
        return dict(self._values)

    def clear(self) -> None:
        """Forget all values. One that is being built is kept afterwards: `build` should check for that."""
        self._values.clear()
