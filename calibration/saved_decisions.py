"""Decisions on disk, so that an interrupted calibration continues where it stopped."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile

import numpy as np

from ppllava_edge.calibration.layer_choice import Choice
from ppllava_edge.engines.errors import PPLLaVAError
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
    with _replaced(file) as f:
        np.savez(f, told=np.frombuffer(json.dumps(groups).encode(), np.uint8), **arrays)


def read_decisions(file: Path) -> list[GroupDecision]:
    """Read the decisions that `save_decisions` wrote.

    Raises:
        PPLLaVAError: If the file is damaged.
    """
    try:
        return _parse(file)
    except (EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise PPLLaVAError(
            f"{file} is damaged ({error}); run the command again, it starts from the beginning"
        ) from None


def _parse(file: Path) -> list[GroupDecision]:
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
    write_text(path, json.dumps(value))


def write_text(path: Path, text: str) -> None:
    """Write a text atomically."""
    with _replaced(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` when it is complete and synced: a power cut leaves no empty one."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
