"""A bundle's tokenizers and prompt template: from questions to token ids, and back."""

from __future__ import annotations

import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.prompt_template import IMAGE, TEMPLATES, PromptTemplate
from ppllava_edge.engines.errors import BundleError, PromptError
from ppllava_edge.runtime.language.tokenizer import BundleTokenizer, check_text
from ppllava_edge.runtime.lazy import locked_cached_property


class TextProcessor:
    """Builds prompts for the decoder and ids for the question tower.

    Control tokens are recognised in the prompt template only; in a question they are ordinary text.

    Args:
        bundle: The bundle; its tokenizers load on first use.
        template: A prompt template, or the name of one; None: the bundle's own.

    Raises:
        PromptError: If no template has this name, or this is none.
        BundleError: If the bundle was exported without tokenizers.
    """

    def __init__(self, bundle: Bundle, template: str | PromptTemplate | None = None):
        self.bundle = bundle
        self.manifest = bundle.manifest
        if isinstance(template, str):
            if template not in TEMPLATES:
                raise PromptError(f"prompt template {template!r} is unknown; choose {', '.join(TEMPLATES)}")
            template = TEMPLATES[template]
        elif template is not None and not isinstance(template, PromptTemplate):
            raise PromptError(f"template must be a name or a PromptTemplate, not {type(template).__name__}")
        self.template = template or bundle.manifest.prompt
        if not bundle.manifest.tokenizer:
            raise BundleError(
                f"{bundle.path} was exported with --no-tokenizer: "
                "it takes and gives token ids only (through Pipeline)"
            )

    @locked_cached_property
    def tokenizer(self) -> BundleTokenizer:
        """The decoder's tokenizer."""
        return BundleTokenizer(self.bundle.file("tokenizer.json"))

    @locked_cached_property
    def question_tokenizer(self) -> BundleTokenizer:
        """The question tower's tokenizer."""
        return BundleTokenizer(self.bundle.file("question_tokenizer.json"))

    def close(self) -> None:
        """Release the tokenizers; they load again if they are used."""
        for name in ("tokenizer", "question_tokenizer"):
            self.__dict__.pop(name, None)

    def question_ids(self, question: str) -> tuple[np.ndarray, bool]:
        """Tokenize a question for the question tower, as upstream does.

        Returns:
            Ids (1, L) int64, and whether the question was too long and had to be truncated.
        """
        info = self.manifest.question
        assert info is not None
        ids = self.question_tokenizer.encode(question, add_special_tokens=True)
        truncated = len(ids) > info.length
        if truncated:
            ids = [*ids[: info.length - 1], ids[-1]]  # keep the end token
        if info.padded:
            ids = ids + [info.pad_id] * (info.length - len(ids))
        return np.array([ids], np.int64), truncated

    def prompt_pieces(self, question: str) -> list[list[int]]:
        """Tokenize the prompt for a question about one video or image.

        Returns:
            Token ids before the visual tokens, and token ids after them.

        Raises:
            BundleError: If the tokenizer doesn't give exactly one image token.
        """
        pieces: list[list[int]] = [[]]
        for i in self.tokenizer.encode_prompt(self.template.question_prompt, question):
            if i == self.manifest.image_token:
                pieces.append([])
            else:
                pieces[-1].append(i)
        if len(pieces) != 2:
            raise BundleError(
                f"the tokenizer of {self.bundle.path} gives {len(pieces) - 1} image tokens "
                "for a prompt with one; export it again"
            )
        return pieces

    def follow_up_ids(self, question: str) -> list[int]:
        """Tokenize a follow-up question of a conversation.

        Returns:
            The token ids to append to the conversation.

        Raises:
            BundleError: If the tokenizer gives an image token.
        """
        ids = self.tokenizer.encode_prompt(self.template.follow_up, question, add_special_tokens=False)
        if self.manifest.image_token in ids:
            raise BundleError(
                f"the tokenizer of {self.bundle.path} gives an image token "
                "for a question without one; export it again"
            )
        return ids


def clean_question(question: str) -> str:
    """Remove image tags and outer white space from a question.

    Raises:
        PromptError: If it isn't a string, is too long, contains surrogates, or nothing is left.
    """
    check_text(question)
    question = question.replace(IMAGE, " ").strip()
    if not question:
        raise PromptError("the question is empty")
    return question
