"""Training batches: scenes drawn on the fly, with the ground truth that the losses need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppllava_edge.nano.vocabulary import ASK, END, POSITION_BINS, TEXT_ID, encode
from ppllava_edge.nano.world import FRAME, KINDS, MAX_OBJECTS, STEPS, Scene, ask, draw, sample_scene

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
COVERED = 0.12  # a patch shows an object if it covers this share of it
QUESTIONS = ["color", "shape", "direction", "direction", "count", "presence", "order", "position", "brief"]
# Towards the end the easiest kind makes room for the hardest (color is still asked instead of kinds that a scene does not allow).
LATE_QUESTIONS = ["order", *QUESTIONS[1:]]
INSTEAD = ["shape", "color", "presence"]  # asked where a scene does not allow a kind


@dataclass
class Batch:
    """pixels (B,T,3,H,W). Per object, padded to four with -1: colors, shapes, motions (B,4); hit (B,4,T*P): it shows in that patch;
    row, column (B,4,T) its centre's bin. owner (B,T*P): the object that covers most of a patch, -1 for none.
    first, last (B): objects that enter first and last, -1 unless staggered. Question k of a clip: text (B,K), answer (ids), kind."""

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
    """Draw a batch. single: one frame of each scene instead of a clip. questions: kinds to ask about each clip, a description beside them."""
    grid = FRAME // patch
    frames = 1 if single else STEPS
    objects = {name: np.full((clips, MAX_OBJECTS), -1) for name in ("colors", "shapes", "motions")}
    pixels = np.empty((clips, frames, 3, FRAME, FRAME), np.float32)
    coverage = np.zeros((clips, MAX_OBJECTS, frames, grid, grid), np.float32)
    bins = np.zeros((clips, MAX_OBJECTS, frames, 2), np.int64)
    order = np.full((clips, 2), -1)
    text, answers, kinds = [], [], []
    for b in range(clips):
        scene = sample_scene(rng)
        n = len(scene)
        times = np.arange(STEPS) + rng.random()
        if single:
            times = times[rng.integers(STEPS, size=1)]
        drawn, owner = draw(scene, times, rng, noise=float(rng.uniform(0, 4)))
        pixels[b] = ((drawn.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
        for name in objects:
            objects[name][b, :n] = getattr(scene, name)
        mine = owner[:, None] == np.arange(n, dtype=np.int8)[:, None, None]
        coverage[b, :n] = mine.reshape(frames, n, grid, patch, grid, patch).mean((3, 5)).transpose(1, 0, 2, 3)
        bins[b, :n] = np.clip(
            scene.centers(times) // (FRAME / POSITION_BINS), 0, POSITION_BINS - 1
        ).transpose(1, 0, 2)
        if scene.staggered:
            order[b] = scene.appears.argmin(), scene.appears.argmax()
        if questions:
            asked = [_question(scene, kind, rng) for kind in [*questions, "describe"]]
            text.append([TEXT_ID[question] for _, question, _ in asked])
            answers.append([encode(answer) for _, _, answer in asked])
            kinds.append([KINDS.index(kind) for kind, _, _ in asked])
    flat = torch.from_numpy(coverage).flatten(2)
    most, owner_of = flat.max(1)
    colors, shapes, motions = (torch.from_numpy(objects[name]) for name in ("colors", "shapes", "motions"))
    first, last = torch.from_numpy(order).unbind(1)
    return Batch(
        torch.from_numpy(pixels),
        colors,
        shapes,
        motions,
        flat > COVERED,
        torch.where(most > COVERED, owner_of, -1),
        torch.from_numpy(bins[..., 1].copy()),
        torch.from_numpy(bins[..., 0].copy()),
        first,
        last,
        torch.tensor(text),
        answers,
        torch.tensor(kinds),
    )


def _question(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Kind, question and answer; another kind where the scene does not allow this one."""
    asked = ask(scene, kind, rng)
    while asked is None:
        kind = str(rng.choice(INSTEAD))
        asked = ask(scene, kind, rng)
    return kind, *asked


def decoder_sequences(questions: list[list[int]], answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (N,L) "question <a> answer </s>" without the last token, and labels (N,L), -100 outside the answer."""
    ask_id, end_id = encode(f"{ASK} {END}")
    length = max(len(q) + len(a) for q, a in zip(questions, answers)) + 1
    ids, labels = (
        torch.zeros(len(questions), length, dtype=torch.long),
        torch.full((len(questions), length), -100),
    )
    for row, (q, a) in enumerate(zip(questions, answers)):
        sequence = [*q, ask_id, *a]
        ids[row, : len(sequence)] = torch.tensor(sequence)
        labels[row, len(q) : len(sequence)] = torch.tensor([*a, end_id])
    return ids, labels
