"""detokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class Detokenizer:
    """Turns ids into text piece by piece. A piece is given out only when later ids can't change it.

    Ids are decoded together with the few before them, because many tokenizers need those for spaces.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop_strings: Iterable[str] = ()):
        self._decode = decode
        self._ids: list[int] = []
        self._start = self._given = 0  # ids before _start are settled; those before _given were given out
        self._held = ""  # text that may be the beginning of a stop string
        self._stops = [s for s in stop_strings if s]
        self.stopped = False

    def push(self, token: int) -> str:
        """Add an id → text that can be shown now (often empty)."""
        if self.stopped:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._given])
        after = self._decode(self._ids[self._start :])
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""  # half a character, or nothing yet
        self._start, self._given = self._given, len(self._ids)
        return self._past_stops(after[len(before) :])

    def finish(self) -> str:
        """The rest, when no more ids come."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._start : self._given])
        rest = self._decode(self._ids[self._start :])[len(before) :]
        text = self._past_stops(rest) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    def _past_stops(self, text: str) -> str:
        text = self._held + text
        self._held = ""
        found = [at for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = max((n for s in self._stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        if keep:
            text, self._held = text[:-keep], text[-keep:]
        return text


def stream_text(
    ids: Iterator[int], detokenizer: Detokenizer, stop_ids: Iterable[int]
) -> Iterator[tuple[int, str]]:
    """(id, text that can be shown) for every id, until a stop id or a stop string; a last pair (-1, rest) may follow."""
    stops = set(stop_ids)
    for token in ids:
        if token in stops:
            yield token, ""
            break
        yield token, detokenizer.push(token)
        if detokenizer.stopped:
            break
    rest = detokenizer.finish()
    if rest:
        yield -1, rest
