"""Fixtures of the language tests: small tokenizers of the kinds that models come with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.runtime.language.tokenizer import BundleTokenizer

CORPUS = [
    "What color is the circle? How many objects are there in the video, and which of them moves left?",
    "USER: Describe the video. ASSISTANT: a red circle moves right, a blue square stays still.",
    "system user assistant question answer <b> end of text im start im end tool call s unk pad",
] * 4


def byte_level() -> Tokenizer:
    """As Qwen's: BPE over bytes; control tokens outside the vocabulary, one of them not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</s>"])
    tokenizer.add_tokens(
        [AddedToken("<tool_call>", normalized=False), AddedToken("lidar"), AddedToken("    ")]
    )
    return tokenizer


def byte_fallback(metaspace: bool = False) -> Tokenizer:
    """As Llama's: BPE with spaces as ▁ and bytes for unknown characters; control tokens in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = decoders.Strip(" ", 1, 0)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
        )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special))
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # the bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens(["<image>", "<pad>", "<|im_end|>"])
    ids = [("<s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    return tokenizer


def merged_control_token() -> Tokenizer:
    """As Gemma's: a control token that merges of ordinary characters give, too."""
    pieces = ["<unk>", "<", "b", ">", "<b", "<b>", "a", "▁", "</s>", "<b>a", "h", "i"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("<", "b"), ("<b", ">"), ("<b>", "a")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.add_special_tokens(["<unk>", "</s>", "<image>"])
    tokenizer.add_tokens([AddedToken("<b>", normalized=False)])
    return tokenizer


def clip() -> Tokenizer:
    """As CLIP's: lowercase BPE with word ends, around it start and end, which is the unknown token too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    spec = json.loads(tokenizer.to_str())
    letters = [piece for piece in spec["model"]["vocab"] if len(piece) == 1]
    for piece in letters:  # OpenAI's vocabulary has every byte at the end of a word
        spec["model"]["vocab"].setdefault(f"{piece}</w>", len(spec["model"]["vocab"]))
    for token in spec["added_tokens"]:
        token["normalized"] = True
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", 1), ("<|startoftext|>", 0), add_prefix_space=False, trim_offsets=False
    )
    return tokenizer


def unigram() -> Tokenizer:
    """As SigLIP's: Unigram, whose vocabulary holds the control tokens with the best score of all."""
    control = ["<pad>", "</s>", "<unk>"]
    characters = sorted({character for text in CORPUS for character in text} - {" "})
    pieces = [(token, 0.0) for token in control] + [("▁", -3.0), *((c, -5.0) for c in characters)]
    words = sorted({f"▁{word}" for text in CORPUS for word in text.split() if len(word) > 1})
    tokenizer = Tokenizer(models.Unigram([*pieces, *((word, -7.0) for word in words)], 2, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(control)
    ids = [("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=ids)
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT's: words and their parts, control tokens in square brackets."""
    control = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # so that "[SEP]" is a word
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=control))
    ids = [("[CLS]", 2), ("[SEP]", 3)]
    single = "[CLS] $A [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def word_level() -> Tokenizer:
    """Whole words, control tokens among them."""
    words = ["<unk>", "</s>", "<image>", *sorted({word for text in CORPUS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>", "<image>"])
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "metaspace": lambda: byte_fallback(metaspace=True),
    "merged control token": merged_control_token,
    "clip": clip,
    "unigram": unigram,
    "word piece": word_piece,
    "word level": word_level,
    "nano": lambda: Tokenizer.from_file(str(packed_bundle() / "tokenizer.json")),
    "nano's question tower": lambda: Tokenizer.from_file(str(packed_bundle() / "question_tokenizer.json")),
}


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the tokenizer file of a family, given its name."""
    folder = tmp_path_factory.mktemp("tokenizers")

    def write(name: str) -> Path:
        path = folder / f"{name.replace(' ', '-')}.json"
        FAMILIES[name]().save(str(path))
        return path

    return write


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tokenizer_file: Callable[[str], Path]) -> tuple[Tokenizer, Any]:
    """The library's own tokenizer of a family, and ours."""
    path = tokenizer_file(request.param)
    return Tokenizer.from_file(str(path)), BundleTokenizer(path)
