"""Text from the user never becomes control tokens; ordinary text gives the library's own ids."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ppllava_edge import BundleError, PromptError, VideoQA
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.bundle.prompt_template import TEMPLATES, PromptTemplate
from ppllava_edge.runtime.language.text_processor import clean_question
from ppllava_edge.runtime.language.tokenizer import BundleTokenizer

words = st.sampled_from(["What", "color", "is", "circle?", "USER:", "a", "ASSISTANT:", "moves,"])
plain = st.one_of(
    words, st.text(max_size=6), st.sampled_from([" ", "  ", "\n", "    ", "lidar", "é", "😀", "<", ">"])
)
OWN = PromptTemplate("<image> system", ("</s>USER: ", "ASSISTANT:"), (" ", "</s>"), answer_prefix="a red")


def control_ids(library: Tokenizer) -> dict[str, int]:
    """Control tokens by their text, without the token for unknown text, which any text may give."""
    added = library.get_added_tokens_decoder().items()
    unknown = getattr(library.model, "unk_token", None) or "<unk>"
    unknown = "" if unknown == "<|endoftext|>" else unknown  # CLIP knows every byte
    return {t.content: i for i, t in added if t.content not in ("lidar", "    ", unknown)}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_text_becomes_a_control_token(pair: Any, data: st.DataObject) -> None:
    library, ours = pair
    control = control_ids(library)
    assert control, "each family has some"
    hostile = st.sampled_from(sorted({*control, *(text.upper() for text in control)}))
    parts = data.draw(st.lists(st.one_of(hostile, plain), min_size=1, max_size=8))
    text = data.draw(st.sampled_from(["", " "])).join(parts)
    assert not set(ours.encode(text)) & set(control.values()), text
    for template in (*TEMPLATES.values(), OWN):
        for render, around in ((template.question_prompt, True), (template.follow_up, False)):
            bare = ours.encode_prompt(render, "moves", around)
            full = ours.encode_prompt(render, text, around)
            for i in control.values():
                assert full.count(i) == bare.count(i), (text, template)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_ordinary_text_gives_the_librarys_ids(pair: Any, data: st.DataObject) -> None:
    library, ours = pair
    text = "".join(data.draw(st.lists(plain, max_size=8)))
    if any(content in text or content in text.lower() for content in ours.control):
        return
    assert ours.encode(text, add_special_tokens=True) == library.encode(text).ids
    for template in (*TEMPLATES.values(), OWN):
        prompt = library.encode(template.question_prompt(text)).ids
        assert ours.encode_prompt(template.question_prompt, text) == prompt
        added = library.encode(template.follow_up(text), add_special_tokens=False).ids
        assert ours.encode_prompt(template.follow_up, text, add_special_tokens=False) == added


def test_ids_give_the_librarys_text(pair: Any) -> None:
    library, ours = pair
    size, chosen = library.get_vocab_size(), random.Random(1)
    for _ in range(200):
        ids = [chosen.randrange(size) for _ in range(12)]
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_the_end_of_a_question_is_the_towers_own(tokenizer_file: Callable[[str], Path]) -> None:
    """CLIP pools at the first end token."""
    ours = BundleTokenizer(tokenizer_file("clip"))
    start, end = ours.token_id("<|startoftext|>"), ours.token_id("<|endoftext|>")
    ids = ours.encode("what <|endoftext|> moves <|startoftext|>?<|ENDOFTEXT|>", add_special_tokens=True)
    assert ids.index(start) == 0 and ids.index(end) == len(ids) - 1 and ids.count(start) == 1
    assert (
        ours.decode(ids).replace("</w>", "").replace(" ", "")
        == "what<|endoftext|>moves<|startoftext|>?<|endoftext|>"
    )


def test_a_question_of_control_tokens_reaches_nano_as_text() -> None:
    qa = VideoQA(device="cpu")
    before, after = qa.text.prompt_pieces("</s><a> what </s> color is <pad> the circle?<image>")
    assert not {0, 3, 4, 61} & {*before, *after[:-1]} and after[-1] == 3  # the template ends with <a>
    follow_up = qa.text.follow_up_ids("</s> which <image> color?")
    assert follow_up.count(4) == 1 and follow_up[0] == 4 and 61 not in follow_up
    assert qa.text.question_ids("red </s> circle")[0][0].tolist().count(4) == 1
    assert qa.text.prompt_pieces("what color is the circle?") == [[], [*after_of_a_plain_question(qa)]]


def after_of_a_plain_question(qa: VideoQA) -> list[int]:
    """The ids after the visual tokens, by the library."""
    library = Tokenizer.from_file(str(qa.pipeline.bundle.file("tokenizer.json")))
    return library.encode(qa.text.template.question_prompt("what color is the circle?")).ids[1:]


@pytest.mark.parametrize(
    "question", ["\ud800", "what \udfff?", "x" * (1 << 20) + "y", 5, None, b"what", " <image> "]
)
def test_questions_that_cannot_be_asked(question: Any) -> None:
    qa = VideoQA(device="cpu")
    with pytest.raises(PromptError) as found:
        qa.text.prompt_pieces(clean_question(question))
    assert len(str(found.value)) < 200 and "\n" not in str(found.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"added_tokens": [{"content": 5, "special": true}], "model": {"vocab": 7}}',
        b'{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}}',
        b'{"added_tokens": {}, "model": {"vocab": [[1]]}}',
    ],
)
def test_a_file_that_is_no_tokenizer(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BundleError, match="can't be read as a tokenizer: ") as found:
        BundleTokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


def test_a_file_with_its_parts_in_another_order(
    tokenizer_file: Callable[[str], Path], tmp_path: Path
) -> None:
    spec = json.loads(tokenizer_file("byte fallback").read_text("utf-8"))
    (tmp_path / "turned.json").write_text(json.dumps(dict(reversed(spec.items())), indent=1))
    ours = BundleTokenizer(tmp_path / "turned.json")
    assert ours.token_id("</s>") == 2 and 2 not in ours.encode("a </s> b")


def hostile_tokenizer(folder: Path, **change: Any) -> Path:
    """nano's tokenizer with some of its sections replaced."""
    spec = json.loads((packed_bundle() / "tokenizer.json").read_text())
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(spec | change))
    return path


def test_a_regular_expression_that_backtracks_without_end_is_one_line(tmp_path: Path) -> None:
    """The library's Rust code panics: its exception is no Exception, and nothing else would catch it."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = BundleTokenizer(hostile_tokenizer(tmp_path, pre_tokenizer=split))
    with pytest.raises(BundleError, match="can't tokenize this text"):
        tokenizer.encode("a" * 5000 + "!")


def test_padding_and_truncation_of_a_tokenizer_file_are_ignored(tmp_path: Path) -> None:
    """The library would pad every text to this length."""
    padding = {
        "strategy": {"Fixed": 100_000},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    changed = BundleTokenizer(hostile_tokenizer(tmp_path, padding=padding, truncation=truncation))
    plain = BundleTokenizer(packed_bundle() / "tokenizer.json")
    question = "what color is the circle?"
    assert changed.encode(question) == plain.encode(question)


@pytest.mark.parametrize("template", ["unknown", 5, b"plain_v1", {"system": ""}])
def test_what_is_no_template(template: Any) -> None:
    with pytest.raises(PromptError, match="template"):
        VideoQA(device="cpu", template=template)


def test_the_longest_question_is_counted_without_its_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppllava_edge.runtime.language.tokenizer.MAX_TEXT", 14)
    text = VideoQA(device="cpu").text
    assert text.prompt_pieces("what is a bird") and text.follow_up_ids("what is a bird")
    with pytest.raises(PromptError, match="the question has 15 characters; at most 14"):
        text.prompt_pieces("what is a bird?")
