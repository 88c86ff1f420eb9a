"""Text in and out: tokenizers, the prompt's pieces, and detokenisation that never prints half a character."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.prompt_template import IMAGE, TEMPLATES, PromptTemplate
from ppllava_edge.engines.errors import BundleError, PromptError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextProcessor:
    """A bundle's tokenizers and prompt template."""

    def __init__(self, bundle: Bundle, template: str | PromptTemplate | None = None):
        self.bundle, self.manifest = bundle, bundle.manifest
        if isinstance(template, str):
            if template not in TEMPLATES:
                raise PromptError(f"prompt template {template!r} is unknown; choose {', '.join(TEMPLATES)}")
            template = TEMPLATES[template]
        self.template = template or bundle.manifest.prompt
        if not bundle.manifest.tokenizer:
            raise BundleError(
                f"{bundle.path} was exported with --no-tokenizer: it answers token ids only (through Pipeline)"
            )

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
            raise BundleError(
                f"the tokenizer of {self.bundle.path} gives {len(pieces) - 1} image places for a prompt with one; export it again"
            )
        return pieces

    def follow_up_ids(self, question: str) -> list[int]:
        """Token ids that a further question adds to a conversation. Raises BundleError if they hold an image place."""
        ids: list[int] = self.tokenizer.encode(
            self.template.follow_up(question), add_special_tokens=False
        ).ids
        if self.manifest.image_token in ids:
            raise BundleError(
                f"the tokenizer of {self.bundle.path} gives an image place for a question without one; export it again"
            )
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
