"""A bundle's tokenizer, which never turns text from the user into control tokens.

The tokenizers library recognises added tokens such as "</s>" in any text. Prompt templates need that; in a
question it would let the user write the roles, the end of the prompt, or the placeholder of the video. So
control tokens are given random names when the tokenizer is loaded. The prompt template's own parts are
rewritten to these names; nobody else knows them. Everything else is left to the library, so that the ids of
ordinary text stay the same, also next to control tokens.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppllava_edge.engines.bundle.untrusted import printable
from ppllava_edge.engines.errors import BundleError, PromptError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

log = logging.getLogger(__name__)
MAX_FILE = 128 << 20  # bytes; the largest published tokenizers have 35 MB
MAX_TEXT = 1 << 20  # characters of one text
# Not marked as special in every tokenizer: Qwen's <tool_call>, code models' <|fim_prefix|>.
_LOOKS_LIKE_CONTROL = re.compile(r"[<\[{]\S+[>\]}]")
_ADDED_TOKENS = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')


class BundleTokenizer:
    """A tokenizer file. Thread-safe.

    Control tokens are added tokens that are special, or in brackets. Other added tokens (words, runs of
    spaces) are recognised in any text.

    Args:
        path: tokenizer.json of the tokenizers library.

    Attributes:
        control: Texts of the control tokens.

    Raises:
        BundleError: If the file can't be read as a tokenizer.
    """

    def __init__(self, path: Path):
        self._mark = _random_letters(20)
        try:
            if path.stat().st_size > MAX_FILE:
                raise ValueError(f"it has more than {MAX_FILE >> 20} MiB")
            self._tokenizer, names = _load(path.read_bytes(), self._mark)
            # This package pads and truncates by itself. The file's own numbers would size an allocation, and
            # the library ends the process when that fails.
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        except BaseException as error:
            _raise_unless_failure(error)
            raise BundleError(f"{path} can't be read as a tokenizer: {_first_line(error)}") from None
        self._path = path
        self.control = frozenset(names)
        self._names = names
        longest_first = sorted(names, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Tokenize text from the user or a data set: none of it becomes a control token.

        Args:
            text: Any text.
            add_special_tokens: Add the tokens that the tokenizer puts around a text.

        Raises:
            PromptError: See check_text.
            BundleError: If the tokenizer fails.
        """
        check_text(text)
        ids: list[int] = self._encode(text, add_special_tokens).ids
        return ids

    def encode_prompt(
        self, render: Callable[[str], str], text: str, add_special_tokens: bool = True
    ) -> list[int]:
        """Tokenize text from the user together with its prompt template.

        Args:
            render: text → prompt. Control tokens that it adds are recognised, those in the text aren't.
            text: Any text.
            add_special_tokens: Add the tokens that the tokenizer puts around a prompt.

        Raises:
            PromptError: See check_text.
            BundleError: If the tokenizer fails.
        """
        check_text(text)  # alone: its length is the user's, the template's isn't
        place = _random_letters(20)
        parts = [
            self._control_pattern.sub(lambda found: self._names[found.group()], part)
            for part in render(place).split(place)
        ]
        ids: list[int] = self._encode(text.join(parts), add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Raises BundleError if the tokenizer fails."""
        try:
            text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            _raise_unless_failure(error)
            raise BundleError(f"{self._path} can't decode an answer: {_first_line(error)}") from None
        if self._mark in text:  # control tokens that aren't special are part of the text
            for content, name in self._names.items():
                text = text.replace(name, content)
        return text

    def token_id(self, content: str) -> int | None:
        """The id of a token by its text; None if there is none."""
        number: int | None = self._tokenizer.token_to_id(self._names.get(content, content))
        return number

    def _encode(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            _raise_unless_failure(error)
            raise BundleError(f"{self._path} can't tokenize this text: {_first_line(error)}") from None


def check_text(text: object) -> None:
    """Check that a text from the user can be tokenized.

    Raises:
        PromptError: If it isn't a string, is too long, or contains surrogates.
    """
    if not isinstance(text, str):
        raise PromptError(f"the question must be a string, not {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise PromptError(f"the question has {len(text)} characters; at most {MAX_TEXT} are read")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(
            "the question contains surrogates (half a UTF-16 character): decode it as UTF-8"
        ) from None


def _load(raw: bytes, mark: str) -> tuple[Tokenizer, dict[str, str]]:
    """Load tokenizer.json with renamed control tokens. Returns it, and the new names by the old ones."""
    from tokenizers import Tokenizer

    # A vocabulary of 150 000 tokens takes 50 MB as Python objects, so it isn't parsed where renaming in the
    # file's bytes will do.
    try:
        renamed, names = _rename_in_file(raw, mark)
        tokenizer: Tokenizer = Tokenizer.from_buffer(renamed)
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        known = any(tokenizer.token_to_id(content) is not None for content in names)
        if added >= set(names.values()) and not known:
            return tokenizer, names
    except BaseException as error:  # if the file is bad, that is raised below
        _raise_unless_failure(error)
        log.debug("renaming control tokens in the file failed: %s", error)
    spec = json.loads(raw)
    names = _rename_in_spec(spec, mark)
    return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False)), names


def _rename(added_tokens: list[dict[str, Any]], mark: str) -> dict[str, str]:
    """Rename the control tokens among the added tokens, in place."""
    names: dict[str, str] = {}
    for token in added_tokens:
        content = token["content"]
        if not isinstance(content, str):
            raise ValueError("an added token isn't a text")
        if content and (token["special"] or _LOOKS_LIKE_CONTROL.fullmatch(content)):
            token["content"] = names.setdefault(content, mark + _as_letters(len(names)))
    return names


def _rename_in_file(raw: bytes, mark: str) -> tuple[bytes, dict[str, str]]:
    """Rename control tokens in the bytes of tokenizer.json: wherever they are a whole string.

    Raises:
        ValueError: If the list of added tokens doesn't stand before the model.
    """
    found = _ADDED_TOKENS.search(raw)
    if found is None:
        raise ValueError("it has no list of added tokens")
    start = found.end()
    before_model = raw[start : raw.index(b'"model"', start)].decode()
    added, length = json.JSONDecoder().raw_decode(before_model)
    names = _rename(added, mark)
    rest = memoryview(raw)[start + len(before_model[:length].encode()) :]
    renamed = b"".join([raw[:start], json.dumps(added).encode(), rest])
    for content, name in names.items():
        renamed = renamed.replace(json.dumps(content, ensure_ascii=False).encode(), f'"{name}"'.encode())
    return renamed, names


def _rename_in_spec(spec: dict[str, Any], mark: str) -> dict[str, str]:
    """Rename control tokens in the parsed tokenizer.json, in place. Drops merges that give one of them."""
    names = _rename(spec.get("added_tokens", []), mark)
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [text, score], ids by position
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
        return names
    in_vocab = names.keys() & vocab.keys()
    for content in in_vocab:
        vocab[names[content]] = vocab.pop(content)
    if model.get("unk_token") in in_vocab:
        model["unk_token"] = names[model["unk_token"]]
    if in_vocab and "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if in_vocab.isdisjoint(_texts_of(merge))]
    return names


def _texts_of(merge: str | list[str]) -> tuple[str, str, str]:
    """Both parts of a BPE merge, and its result."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second, first + second


def _raise_unless_failure(error: BaseException) -> None:
    """Raise the error again unless it means that the tokenizers library failed.

    The library raises bare Exception, and where its Rust code panics (a regular expression that backtracks
    too often) PanicException, which is no Exception and can't be imported.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _first_line(error: BaseException) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def _random_letters(count: int) -> str:
    return "".join("bcdfghjkmpqvwxyz"[byte % 16] for byte in secrets.token_bytes(count))


def _as_letters(number: int) -> str:
    """A number in letters. All have the same length, so that no name is the beginning of another one."""
    return "".join("bcdfghjkmp"[int(digit)] for digit in f"{number:06d}")
