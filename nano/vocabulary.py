"""Nano's words, and every text that its question tower meets while it trains. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ppllava_edge.nano.world import BRIEF, COLOR_NAMES, MOTION_NAMES, NUMBER_NAMES, SHAPE_NAMES, STILL

PAD, UNKNOWN, BEGIN, ASK, END = "<pad>", "<unk>", "<s>", "<a>", "</s>"
# Pretraining texts name rows and columns a third of a patch wide: where in its patch an object is tells how it moves.
POSITION_BINS = 27

# Id 2 is not the end token: for CLIP's configuration 2 means the legacy pooling rule (see export/checkpoint.py).
WORDS = [PAD, UNKNOWN, BEGIN, ASK, END, "?", "."]
WORDS += COLOR_NAMES + SHAPE_NAMES + MOTION_NAMES + NUMBER_NAMES
WORDS += [
    "what",
    "color",
    "is",
    "the",
    "shape",
    "object",
    "which",
    "direction",
    "does",
    "move",
    "how",
    "many",
    "objects",
    "are",
    "there",
]
WORDS += ["a", "appears", "first", "last", "where"]
WORDS += ["describe", "video", "moves", "stays", "yes", "no", "none", "top", "bottom", "center", "<image>"]
SPOKEN = len(WORDS)  # the words after these occur in pretraining texts only and are not exported
WORDS += ["at", "column", "row"] + [f"p{k}" for k in range(POSITION_BINS)]
WORD_ID = {word: i for i, word in enumerate(WORDS)}


def encode(text: str) -> list[int]:
    """Ids of a text whose words are separated by spaces."""
    return [WORD_ID[word] for word in text.split()]


@dataclass(frozen=True)
class Text:
    """A text and what it refers to: indices into the name lists, -1 where it says nothing."""

    words: str
    color: int = -1
    shape: int = -1
    motion: int = -1


def _motion_words(motion: int) -> str:
    return {STILL: "stays still", BRIEF: "appears briefly"}.get(motion, f"moves {MOTION_NAMES[motion]}")


def _catalogue() -> tuple[list[Text], dict[str, np.ndarray]]:
    texts: list[Text] = []
    groups: dict[str, list[int]] = {}

    def add(group: str, words: str, **referent: int) -> None:
        groups.setdefault(group, []).append(len(texts))
        texts.append(Text(words, **referent))

    colors, shapes = list(enumerate(COLOR_NAMES)), list(enumerate(SHAPE_NAMES))
    for s, shape in shapes:
        add("ask color", f"what color is the {shape} ?", shape=s)
    for c, color in colors:
        add("ask shape", f"what shape is the {color} object ?", color=c)
    for form in ("which direction does the {} move ?", "is there a {} ?", "where is the {} ?"):
        for c, color in colors:
            for s, shape in shapes:
                add(form, form.format(f"{color} {shape}"), color=c, shape=s)
    add("ask count", "how many objects are there ?")
    add("ask first", "which object appears first ?")
    add("ask last", "which object appears last ?")
    add("ask brief", "which object appears briefly ?", motion=BRIEF)
    add("describe", "describe the video .")
    for c, color in colors:
        add("color", f"a {color} object", color=c)
        for s, shape in shapes:
            add("color shape", f"a {color} {shape}", color=c, shape=s)
            for m in range(len(MOTION_NAMES)):
                add("color shape motion", f"a {color} {shape} {_motion_words(m)}", color=c, shape=s, motion=m)
    for s, shape in shapes:
        add("shape", f"a {shape}", shape=s)
    for m in range(len(MOTION_NAMES)):
        add("motion", f"a object {_motion_words(m)}", motion=m)
    for axis in ("column", "row"):
        for k in range(POSITION_BINS):
            add(axis, f"a object at {axis} p{k}")
    return texts, {name: np.array(ids) for name, ids in groups.items()}


TEXTS, GROUPS = _catalogue()
TEXT_ID = {text.words: i for i, text in enumerate(TEXTS)}
