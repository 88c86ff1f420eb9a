"""Reading values from an untrusted JSON object: each read states what it expects, or raises ValueError."""

from __future__ import annotations

import re
from typing import Any

Numbers = tuple[float, float, float]


class Section:
    """A JSON object whose values are checked as they are read.

    Every method raises ValueError, in one line that names the value, if it is missing or not as expected.

    Args:
        value: The parsed JSON.
        name: The object's path in the file, for messages; "" for a file's outermost object.
    """

    def __init__(self, value: Any, name: str = ""):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object")
        self._value = value
        self._name = name

    def raw(self, key: str) -> Any:
        """The value, unchecked."""
        if key not in self._value:
            raise ValueError(f"{self._path(key)} is missing")
        return self._value[key]

    def is_null(self, key: str) -> bool:
        """Whether the value is null."""
        return self.raw(key) is None

    def section(self, key: str) -> Section:
        """An object."""
        return Section(self.raw(key), self._path(key))

    def facts(self, key: str) -> dict[str, Any] | None:
        """An object with any contents, or None if it is null or missing."""
        value = self._value.get(key)
        return None if value is None else dict(Section(value, self._path(key))._value)

    def texts(self, key: str) -> dict[str, str]:
        """An object of short strings."""
        items = self.section(key)._value.items()
        return {_text(name, self._path(key)): _text(text, self._path(key)) for name, text in items}

    def text(self, key: str) -> str:
        """A short string."""
        return _text(self.raw(key), self._path(key))

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of the given strings."""
        value = self.raw(key)
        if value not in choices:
            raise ValueError(f"{self._path(key)} must be one of {', '.join(choices)}")
        return str(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.raw(key)
        if not isinstance(value, bool):
            raise ValueError(f"{self._path(key)} must be true or false")
        return value

    def count(self, key: str, limit: int, least: int = 1) -> int:
        """A whole number from `least` to `limit`."""
        return _count(self.raw(key), self._path(key), limit, least)

    def counts(self, key: str, limit: int, least: int = 1) -> tuple[int, ...]:
        """A list of whole numbers."""
        return tuple(_count(item, self._path(key), limit, least) for item in self._list(key))

    def pair(self, key: str, limit: int) -> tuple[int, int]:
        """Two whole numbers from 1 to `limit`."""
        return _pair(self.raw(key), self._path(key), limit)

    def pairs(self, key: str, limit: int) -> tuple[tuple[int, int], ...]:
        """A list of pairs."""
        return tuple(_pair(item, self._path(key), limit) for item in self._list(key))

    def positive(self, key: str) -> float:
        """A number above 0."""
        value = self.raw(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e6:
            raise ValueError(f"{self._path(key)} must be a number above 0")
        return float(value)

    def three(self, key: str, positive: bool = False) -> Numbers:
        """Three numbers."""
        value = self.raw(key)
        if isinstance(value, list) and len(value) == 3 and all(isinstance(x, (int, float)) for x in value):
            numbers = (float(value[0]), float(value[1]), float(value[2]))
            if all(abs(x) < 1e6 and (x > 0 or not positive) for x in numbers):
                return numbers
        raise ValueError(f"{self._path(key)} must be three {'positive ' if positive else ''}numbers")

    def sha256(self, key: str) -> str:
        """A SHA-256 in hexadecimal."""
        value = self.raw(key)
        if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError(f"{self._path(key)} is not a SHA-256")
        return value

    def _list(self, key: str) -> list[Any]:
        value = self.raw(key)
        if not isinstance(value, list):
            raise ValueError(f"{self._path(key)} must be a list")
        return value

    def _path(self, key: str) -> str:
        return f"{self._name}.{key}" if self._name else key


def _text(value: object, path: str) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise ValueError(f"{path} must be a short text")
    return value


def _count(value: object, path: str, limit: int, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= limit:
        raise ValueError(f"{path} must be a whole number from {least} to {limit}")
    return value


def _pair(value: object, path: str, limit: int) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{path} must be two whole numbers")
    return _count(value[0], path, limit), _count(value[1], path, limit)
