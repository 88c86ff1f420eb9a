"""Training batches: freshly drawn scenes with the ground truth that the losses need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ppllava_edge.nano.vocabulary import ASK, END, POSITION_BINS, TEXT_ID, encode
from ppllava_edge.nano.world import FRAME, KINDS, MAX_OBJECTS, STEPS, Scene, ask, draw, sample_scene

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
COVERED = 0.12  # a patch shows an object if it covers this share of it
QUESTIONS = ["color", "shape", "direction", "direction", "count", "presence", "order", "position", "brief"]
# In the last stage the hardest kind replaces the easiest.
LATE_QUESTIONS = ["order", *QUESTIONS[1:]]
INSTEAD = ["shape", "color", "presence"]  # kinds to ask about if a scene doesn't allow the wanted one


@dataclass
class Batch:
    """B clips of T frames with P patches, O = 4 objects (missing ones are padding) and K questions each.

    Attributes:
        pixels: (B, T, 3, H, W) float32, normalised.
        colors, shapes, motions: (B, O), indices into the name lists; -1 for padding.
        hit: (B, O, T*P) bool, whether the patch shows the object.
        owner: (B, T*P), the object that covers most of the patch; -1 for none.
        row, column: (B, O, T), the bin of the object's centre.
        first, last: (B), the objects that enter first and last; -1 unless the scene is staggered.
        text: (B, K), the questions as indices into vocabulary.TEXTS.
        answers: Token ids of every answer, by clip and question.
        kinds: (B, K), indices into world.KINDS.
    """

    pixels: Tensor
    colors: Tensor
    shapes: Tensor
    motions: Tensor
    hit: Tensor
    owner: Tensor
    row: Tensor
    column: Tensor
    first: Tensor
    last: Tensor
    text: Tensor
    answers: list[list[list[int]]]
    kinds: Tensor


def make_batch(
    rng: np.random.Generator,
    clips: int,
    patch: int,
    single: bool = False,
    questions: Sequence[str] = QUESTIONS,
) -> Batch:
    """Draw a batch.

    Args:
        rng: Source of all randomness.
        clips: How many scenes.
        patch: Side of a patch, pixels.
        single: Draw one frame of each scene instead of a clip.
        questions: Kinds of questions for each clip, besides a description. Empty: no questions at all.
    """
    canvas = _Canvas(clips, 1 if single else STEPS, patch)
    for b in range(clips):
        scene = sample_scene(rng)
        times = np.arange(STEPS) + rng.random()
        if single:
            times = times[rng.integers(STEPS, size=1)]
        canvas.draw(b, scene, times, rng)
        if questions:
            canvas.ask(scene, [*questions, "describe"], rng)
    return canvas.batch()


@dataclass
class _Canvas:
    """Arrays of a batch, filled clip by clip."""

    clips: int
    frames: int
    patch: int
    text: list[list[int]] = field(default_factory=list)
    answers: list[list[list[int]]] = field(default_factory=list)
    kinds: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        grid = FRAME // self.patch
        objects = (self.clips, MAX_OBJECTS)
        self.attributes = {name: np.full(objects, -1) for name in ("colors", "shapes", "motions")}
        self.pixels = np.empty((self.clips, self.frames, 3, FRAME, FRAME), np.float32)
        self.coverage = np.zeros((*objects, self.frames, grid, grid), np.float32)
        self.bins = np.zeros((*objects, self.frames, 2), np.int64)
        self.order = np.full((self.clips, 2), -1)

    def draw(self, b: int, scene: Scene, times: np.ndarray, rng: np.random.Generator) -> None:
        """Draw the scene of clip b with its ground truth."""
        n = len(scene)
        grid, patch = FRAME // self.patch, self.patch
        drawn, owner = draw(scene, times, rng, noise=float(rng.uniform(0, 4)))
        self.pixels[b] = ((drawn.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
        for name, values in self.attributes.items():
            values[b, :n] = getattr(scene, name)
        mine = owner[:, None] == np.arange(n, dtype=np.int8)[:, None, None]
        share = mine.reshape(self.frames, n, grid, patch, grid, patch).mean((3, 5))
        self.coverage[b, :n] = share.transpose(1, 0, 2, 3)
        bins = np.clip(scene.centers(times) // (FRAME / POSITION_BINS), 0, POSITION_BINS - 1)
        self.bins[b, :n] = bins.transpose(1, 0, 2)
        if scene.staggered:
            self.order[b] = scene.appears.argmin(), scene.appears.argmax()

    def ask(self, scene: Scene, kinds: Sequence[str], rng: np.random.Generator) -> None:
        """Ask about the clip that was drawn last."""
        asked = [_question(scene, kind, rng) for kind in kinds]
        self.text.append([TEXT_ID[question] for _, question, _ in asked])
        self.answers.append([encode(answer) for _, _, answer in asked])
        self.kinds.append([KINDS.index(kind) for kind, _, _ in asked])

    def batch(self) -> Batch:
        coverage = torch.from_numpy(self.coverage).flatten(2)
        largest, owner = coverage.max(1)
        first, last = torch.from_numpy(self.order).unbind(1)
        return Batch(
            pixels=torch.from_numpy(self.pixels),
            colors=torch.from_numpy(self.attributes["colors"]),
            shapes=torch.from_numpy(self.attributes["shapes"]),
            motions=torch.from_numpy(self.attributes["motions"]),
            hit=coverage > COVERED,
            owner=torch.where(largest > COVERED, owner, -1),
            row=torch.from_numpy(self.bins[..., 1].copy()),
            column=torch.from_numpy(self.bins[..., 0].copy()),
            first=first,
            last=last,
            text=torch.tensor(self.text),
            answers=self.answers,
            kinds=torch.tensor(self.kinds),
        )


def _question(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Kind, question and answer; another kind where the scene doesn't allow this one."""
    asked = ask(scene, kind, rng)
    while asked is None:
        kind = str(rng.choice(INSTEAD))
        asked = ask(scene, kind, rng)
    return kind, *asked


def decoder_sequences(questions: list[list[int]], answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The decoder's text, padded to one length.

    Returns:
        Token ids (N, L), "question <a> answer </s>" without the last token, and labels (N, L): the next token
        within the answer, -100 elsewhere.
    """
    ask_id, end_id = encode(f"{ASK} {END}")
    length = max(len(q) + len(a) for q, a in zip(questions, answers)) + 1
    ids = torch.zeros(len(questions), length, dtype=torch.long)
    labels = torch.full((len(questions), length), -100)
    for row, (q, a) in enumerate(zip(questions, answers)):
        sequence = [*q, ask_id, *a]
        ids[row, : len(sequence)] = torch.tensor(sequence)
        labels[row, len(q) : len(sequence)] = torch.tensor([*a, end_id])
    return ids, labels
