"""Decisions on disk, so that an interrupted calibration continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppllava_edge.calibration.layer_choice import Choice
from ppllava_edge.export.quantisation.plan import Scheme


class GroupDecision(NamedTuple):
    """The decisions for layers that share an input.

    Attributes:
        group: Name of the group.
        fold: Scales (K,) to fold; None: none.
        choices: One choice per layer.
    """

    group: str
    fold: np.ndarray | None
    choices: list[Choice]


def save_decisions(file: Path, decisions: Sequence[GroupDecision]) -> None:
    """Write decisions atomically, as plain arrays and JSON."""
    arrays: dict[str, Any] = {}
    groups = []
    for i, (group, fold, choices) in enumerate(decisions):
        if fold is not None:
            arrays[f"fold{i}"] = fold
        plain = []
        for k, choice in enumerate(choices):
            if choice.scheme.importance is not None:
                arrays[f"importance{i}.{k}"] = choice.scheme.importance
            plain.append(asdict(replace(choice, scheme=replace(choice.scheme, importance=None))))
        groups.append([group, plain])
    part = file.with_suffix(".part")
    with open(part, "wb") as f:
        np.savez(f, told=np.frombuffer(json.dumps(groups).encode(), np.uint8), **arrays)
    part.replace(file)


def read_decisions(file: Path) -> list[GroupDecision]:
    """Read the decisions that `save_decisions` wrote."""
    decisions = []
    with np.load(file, allow_pickle=False) as stored:
        for i, (group, plain_choices) in enumerate(json.loads(stored["told"].tobytes())):
            choices = []
            for k, plain in enumerate(plain_choices):
                importance = stored.get(f"importance{i}.{k}")
                scheme = Scheme(**{**plain.pop("scheme"), "importance": importance})
                choices.append(Choice(**{**plain, "scheme": scheme, "shape": tuple(plain["shape"])}))
            decisions.append(GroupDecision(group, stored.get(f"fold{i}"), choices))
    return decisions


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)
