"""Nano's words, and every text that its question tower sees in training. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ppllava_edge.nano.world import BRIEF, COLOR_NAMES, MOTION_NAMES, NUMBER_NAMES, SHAPE_NAMES, motion_words

PAD, UNKNOWN, BEGIN, ASK, END = "<pad>", "<unk>", "<s>", "<a>", "</s>"
# Pretraining texts name rows and columns a third of a patch wide: motion shows as positions within a patch.
POSITION_BINS = 27

# The end token must not have id 2: in CLIP's configuration 2 selects the legacy pooling rule.
WORDS = [PAD, UNKNOWN, BEGIN, ASK, END, "?", "."]
WORDS += COLOR_NAMES + SHAPE_NAMES + MOTION_NAMES + NUMBER_NAMES
WORDS += ["what", "color", "is", "the", "shape", "object", "which", "direction", "does", "move"]
WORDS += ["how", "many", "objects", "are", "there", "a", "appears", "first", "last", "where"]
WORDS += ["describe", "video", "moves", "stays", "yes", "no", "none", "top", "bottom", "center", "<image>"]
SPOKEN = len(WORDS)  # later words occur in pretraining texts only and are not exported
WORDS += ["at", "column", "row"] + [f"p{k}" for k in range(POSITION_BINS)]
WORD_ID = {word: i for i, word in enumerate(WORDS)}

COLORS = list(enumerate(COLOR_NAMES))
SHAPES = list(enumerate(SHAPE_NAMES))
REFERRING_QUESTIONS = ("which direction does the {} move ?", "is there a {} ?", "where is the {} ?")


def encode(text: str) -> list[int]:
    """Ids of a text whose words are separated by spaces."""
    return [WORD_ID[word] for word in text.split()]


@dataclass(frozen=True)
class Text:
    """A text and the objects it refers to.

    Attributes:
        words: The text.
        color, shape, motion: Indices into the name lists; -1 where the text says nothing.
    """

    words: str
    color: int = -1
    shape: int = -1
    motion: int = -1


class _Catalogue:
    """Texts in groups; within a group exactly one text is right for an object."""

    def __init__(self) -> None:
        self.texts: list[Text] = []
        self.groups: dict[str, list[int]] = {}
        self._add_questions()
        self._add_descriptions()

    def _add(self, group: str, words: str, **referent: int) -> None:
        self.groups.setdefault(group, []).append(len(self.texts))
        self.texts.append(Text(words, **referent))

    def _add_questions(self) -> None:
        for s, shape in SHAPES:
            self._add("ask color", f"what color is the {shape} ?", shape=s)
        for c, color in COLORS:
            self._add("ask shape", f"what shape is the {color} object ?", color=c)
        for form in REFERRING_QUESTIONS:
            for c, color in COLORS:
                for s, shape in SHAPES:
                    self._add(form, form.format(f"{color} {shape}"), color=c, shape=s)
        self._add("ask count", "how many objects are there ?")
        self._add("ask first", "which object appears first ?")
        self._add("ask last", "which object appears last ?")
        self._add("ask brief", "which object appears briefly ?", motion=BRIEF)
        self._add("describe", "describe the video .")

    def _add_descriptions(self) -> None:
        motions = range(len(MOTION_NAMES))
        for c, color in COLORS:
            self._add("color", f"a {color} object", color=c)
            for s, shape in SHAPES:
                self._add("color shape", f"a {color} {shape}", color=c, shape=s)
                for m in motions:
                    words = f"a {color} {shape} {motion_words(m)}"
                    self._add("color shape motion", words, color=c, shape=s, motion=m)
        for s, shape in SHAPES:
            self._add("shape", f"a {shape}", shape=s)
        for m in motions:
            self._add("motion", f"a object {motion_words(m)}", motion=m)
        for axis in ("column", "row"):
            for k in range(POSITION_BINS):
                self._add(axis, f"a object at {axis} p{k}")


_catalogue = _Catalogue()
TEXTS = _catalogue.texts
GROUPS = {name: np.array(ids) for name, ids in _catalogue.groups.items()}
TEXT_ID = {text.words: i for i, text in enumerate(TEXTS)}
