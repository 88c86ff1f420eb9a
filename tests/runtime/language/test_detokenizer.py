"""Detokenisation: the streamed pieces add up to the whole text, and half a character is never shown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppllava_edge.bench.models.random_checkpoint import byte_tokenizer
from ppllava_edge.engines.errors import PromptError
from ppllava_edge.runtime.language.detokenizer import Detokenizer, stop_strings, stream_text
from ppllava_edge.runtime.session.answer import GenerationOptions

BYTES = byte_tokenizer(["<s>", "</s>"], "<s> $A")


def decode(ids: list[int]) -> str:
    return BYTES.decode(ids, skip_special_tokens=True)


def encode(text: str) -> list[int]:
    return BYTES.encode(text, add_special_tokens=False).ids


@given(st.text(max_size=60))
def test_pieces_add_up_and_are_whole_characters(text: str) -> None:
    pieces = [piece for _, piece in stream_text(iter(encode(text)), Detokenizer(decode), ())]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(
    st.text(alphabet="abcé€😀 ", max_size=40),
    st.lists(st.text(alphabet="abcé ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_are_never_shown(text: str, stops: list[str]) -> None:
    shown = "".join(piece for _, piece in stream_text(iter(encode(text)), Detokenizer(decode, stops), ()))
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    if not any(stop in text for stop in stops):
        assert shown == text


def test_a_character_of_four_tokens_appears_with_the_last() -> None:
    detokenizer, ids = Detokenizer(decode), encode("😀")
    assert len(ids) == 4
    assert [detokenizer.push(i) for i in ids] == ["", "", "", "😀"]


def test_an_unfinished_character_is_returned_at_the_end() -> None:
    detokenizer = Detokenizer(decode)
    assert "".join(detokenizer.push(i) for i in encode("a😀")[:-1]) == "a"
    assert "\ufffd" in detokenizer.finish()


def test_stop_ids_end_the_stream_and_are_not_text() -> None:
    ids = [*encode("yes"), BYTES.token_to_id("</s>"), *encode("more")]
    found = list(stream_text(iter(ids), Detokenizer(decode), {BYTES.token_to_id("</s>")}))
    assert "".join(piece for _, piece in found) == "yes" and len([i for i, _ in found if i >= 0]) == 4


@pytest.mark.parametrize("kind", ["invalid bytes", "skipped tokens"])
def test_each_step_decodes_few_ids(kind: str) -> None:
    """Otherwise an answer of n tokens without certain text takes n² / 2 steps."""
    unfinished, skipped = encode("😀")[0], BYTES.token_to_id("</s>")
    lengths: list[int] = []

    def counted(ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    detokenizer = Detokenizer(counted)
    shown = "".join(detokenizer.push(unfinished if kind == "invalid bytes" else skipped) for _ in range(1000))
    shown += "".join(detokenizer.push(i) for i in encode("and so on"))
    assert max(lengths) < 100 and shown.endswith("and so on")
    assert shown.count("\ufffd") == (1000 if kind == "invalid bytes" else 0)


def test_one_stop_string_may_stand_alone() -> None:
    assert stop_strings("END") == ("END",) and stop_strings(["a", "b"]) == ("a", "b")
    assert GenerationOptions(stop="END").stop == ("END",)
    shown = [piece for _, piece in stream_text(iter(encode("THE END.")), Detokenizer(decode, "END"), ())]
    assert "".join(shown) == "THE "


@pytest.mark.parametrize(
    "stop", ["", [""], ["a", ""], b"END", [b"END"], 5, None, [5], [None], ["x" * 1025], ["x"] * 65, [["x"]]]
)
def test_unusable_stop_strings(stop: Any) -> None:
    with pytest.raises(PromptError, match="stop") as found:
        GenerationOptions(stop=stop)
    assert "\n" not in str(found.value) and len(str(found.value)) < 120


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": "10"},
        {"max_new_tokens": None},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"timeout": "1"},
        {"sampling": {"temperature": 1}},
        {"sampling": 0.5},
    ],
)
def test_unusable_options_of_generation(options: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=f"^{next(iter(options))} must be ") as found:
        GenerationOptions(**options)
    assert "\n" not in str(found.value) and len(str(found.value)) < 120
