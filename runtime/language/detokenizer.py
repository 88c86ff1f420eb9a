"""Turn token ids into text while they are generated; stop strings and unfinished characters are held back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ppllava_edge.engines.errors import PromptError

INCOMPLETE = "\ufffd"  # decoders put it in place of bytes that aren't a whole character yet
# Ids without certain text after which the text is returned as it is. A character has at most four ids; a
# model that generates invalid UTF-8 or skipped tokens only must not make each step slower than the last.
MAX_PENDING = 32
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024  # characters


def stop_strings(stop: str | Iterable[str]) -> tuple[str, ...]:
    """Check the texts that end an answer.

    Args:
        stop: One text, or several.

    Returns:
        The texts.

    Raises:
        PromptError: If one is empty or isn't a string, or there are too many or too long ones.
    """
    if isinstance(stop, str):
        stop = (stop,)
    if isinstance(stop, bytes) or not isinstance(stop, Iterable):
        raise PromptError(f"stop must be a string or several strings, not {type(stop).__name__}")
    texts: list[str] = []
    for text in stop:
        if not isinstance(text, str):
            raise PromptError(f"stop must consist of strings; one of them is of type {type(text).__name__}")
        if not 0 < len(text) <= MAX_STOP_LENGTH:
            raise PromptError(f"a stop string must have 1 to {MAX_STOP_LENGTH} characters, not {len(text)}")
        texts.append(text)
        if len(texts) > MAX_STOPS:
            raise PromptError(f"there are too many stop strings; at most {MAX_STOPS} are searched for")
    return tuple(texts)


class Detokenizer:
    """Decodes ids one by one. Text is returned once later ids can't change it.

    Many tokenizers decide on spaces by the previous id, so new ids are decoded together with the last ones.

    Args:
        decode: Token ids → text.
        stop: Texts that end the answer, see stop_strings; neither they nor what follows is returned.

    Attributes:
        stopped: A stop string occurred.

    Raises:
        PromptError: If a stop string can't be used.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: str | Iterable[str] = ()):
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # ids before this one no longer influence the text
        self._returned = 0  # the text of ids before this one was returned or is held back
        self._held = ""  # text that may be the beginning of a stop string
        self._stops = stop_strings(stop)
        self.stopped = False

    def push(self, token: int) -> str:
        """Add an id. Returns the text that is certain now, often none."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._new_text()
        uncertain = not text or text.endswith(INCOMPLETE)
        if uncertain and len(self._ids) - self._returned < MAX_PENDING:
            return ""
        self._context, self._returned = self._returned, len(self._ids)
        return self._without_stops(text)

    def finish(self) -> str:
        """Return the rest of the text, when no more ids come."""
        if self.stopped:
            return ""
        text = self._without_stops(self._new_text())
        if not self.stopped:
            text += self._held
        self._held = ""
        return text

    def _new_text(self) -> str:
        """The text of the ids that weren't returned yet."""
        before = self._decode(self._ids[self._context : self._returned])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _without_stops(self, text: str) -> str:
        """Held text and new text, cut at the first stop string; the possible beginning of one is held."""
        text = self._held + text
        self._held = ""
        found = [position for s in self._stops if (position := text.find(s)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = max((n for s in self._stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        if held:
            text, self._held = text[:-held], text[-held:]
        return text


def stream_text(
    ids: Iterator[int], detokenizer: Detokenizer, stop_ids: Iterable[int]
) -> Iterator[tuple[int, str]]:
    """Detokenise a stream of ids, up to a stop id or a stop string.

    Args:
        ids: Generated token ids.
        detokenizer: A new one.
        stop_ids: Ids that end the answer and aren't part of its text.

    Yields:
        Each id with the text that is certain after it; (-1, text) at the end, if there is a rest.
    """
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
