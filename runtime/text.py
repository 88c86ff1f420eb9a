"""Text in and out: tokenizers, the prompt's pieces, and detokenisation that never prints half a character."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.bundle import Bundle
from ..engines.errors import BundleError, PromptError
from ..engines.prompt_template import IMAGE, TEMPLATES, PromptTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextSide:
    """A bundle's tokenizers and prompt template."""

    def __init__(self, bundle: Bundle, template: str | PromptTemplate | None = None):
        self.bundle, self.manifest = bundle, bundle.manifest
        if isinstance(template, str):
            if template not in TEMPLATES:
                raise PromptError(f"prompt template {template!r} is unknown; choose {', '.join(TEMPLATES)}")
            template = TEMPLATES[template]
        self.template = template or bundle.manifest.prompt
        if not bundle.manifest.tokenizer:
            raise BundleError(f"{bundle.path} was exported with --no-tokenizer: it answers token ids only (through Pipeline)")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The decoder's tokenizer."""
        tokenizer: Tokenizer = _load(self.bundle, "tokenizer.json")
        return tokenizer

    @cached_property
    def question_tokenizer(self) -> Tokenizer:
        """The question tower's tokenizer."""
        tokenizer: Tokenizer = _load(self.bundle, "question_tokenizer.json")
        return tokenizer

    def question_ids(self, question: str) -> tuple[np.ndarray, bool]:
        """ids (1,L) int64 for the question tower, as upstream makes them, and whether the question had to be cut."""
        info = self.manifest.question
        assert info is not None
        ids = self.question_tokenizer.encode(question).ids
        cut = len(ids) > info.length
        if cut:
            ids = [*ids[: info.length - 1], ids[-1]]  # the end token stays
        if info.padded:
            ids = ids + [info.pad_id] * (info.length - len(ids))
        return np.array([ids], np.int64), cut

    def prompt_pieces(self, question: str) -> list[list[int]]:
        """Token ids before, between and after the places of the visual tokens."""
        prompt = self.template.question_prompt(question)
        ids = self.tokenizer.encode(prompt).ids
        pieces: list[list[int]] = [[]]
        for i in ids:
            if i == self.manifest.image_token:
                pieces.append([])
            else:
                pieces[-1].append(i)
        if len(pieces) != 2:
            raise BundleError(f"the tokenizer of {self.bundle.path} gives {len(pieces) - 1} image places for a prompt with one; export it again")
        return pieces

    def follow_up_ids(self, question: str) -> list[int]:
        """Token ids that a further question adds to a conversation. Raises BundleError if they hold an image place."""
        ids: list[int] = self.tokenizer.encode(self.template.follow_up(question), add_special_tokens=False).ids
        if self.manifest.image_token in ids:
            raise BundleError(f"the tokenizer of {self.bundle.path} gives an image place for a question without one; export it again")
        return ids


def clean_question(question: str) -> str:
    """A question without image tags and outer white space. Raises PromptError if nothing is left."""
    question = question.replace(IMAGE, " ").strip()
    if not question:
        raise PromptError("the question is empty")
    return question


def _load(bundle: Bundle, name: str) -> Any:
    from tokenizers import Tokenizer

    path = bundle.file(name)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BundleError(f"{path} can't be read as a tokenizer: {error}") from None


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


def stream_text(ids: Iterator[int], detokenizer: Detokenizer, stop_ids: Iterable[int]) -> Iterator[tuple[int, str]]:
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
