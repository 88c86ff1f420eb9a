"""Inputs on disk: the corpus that grows, and the findings that are kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ppllava_edge.bench.fuzz.inputs.seeds import seeds
from ppllava_edge.bench.fuzz.outcome import Outcome
from ppllava_edge.bench.fuzz.targets.target import Target

MOST = 3000  # inputs of a target that are kept in memory
KEPT_PER_SIGNATURE = 3


class Corpus:
    """A folder with a sub-folder per target, and one of findings.

    Args:
        folder: Made if it is missing; inputs of earlier runs are used again.
        targets: The targets to be fuzzed.

    Attributes:
        kept: Seeds and inputs of earlier runs, by target. They run first, unchanged.
        accepted: Inputs by target that the package reads: what most mutations begin with.
        refused: Inputs by target that it refuses, each in a way of its own.
    """

    def __init__(self, folder: Path, targets: list[Target]):
        self.folder = folder
        self.kept: dict[str, list[bytes]] = {}
        for target in targets:
            earlier = sorted((folder / target.name).glob("*")) if (folder / target.name).is_dir() else []
            self.kept[target.name] = [*seeds(target.name), *(path.read_bytes() for path in earlier[:MOST])]
        self.accepted = {target.name: list(seeds(target.name)) for target in targets}
        self.refused: dict[str, list[bytes]] = {target.name: [] for target in targets}

    def add(self, outcome: Outcome, data: bytes) -> None:
        """Keep an input that did something new."""
        known = (self.accepted if outcome.kind == "ok" else self.refused)[outcome.target]
        if len(known) < MOST and data not in known:
            known.append(data)
            self._write(self.folder / outcome.target / _digest(data), data)

    def keep_finding(self, outcome: Outcome, suffix: str, data: bytes) -> Path | None:
        """Keep the input of a finding, and what it did; None if there are enough with this signature."""
        folder = self.folder / "findings" / outcome.signature
        path = folder / (_digest(data) + suffix)
        if folder.is_dir() and len(list(folder.glob(f"*{suffix}"))) >= KEPT_PER_SIGNATURE:
            return None
        self._write(path, data)
        cost = f"{outcome.seconds:.1f} s, {outcome.memory >> 20} MiB"
        text = f"{outcome.signature}\n{cost}\n{outcome.detail}\n".encode(errors="backslashreplace")
        path.with_name(path.name + ".txt").write_bytes(text)
        return path

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
