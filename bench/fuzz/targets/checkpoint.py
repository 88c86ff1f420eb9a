"""Targets that read what export reads: checkpoints of other people."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ppllava_edge.bench.fuzz.targets.target import Target, expect
from ppllava_edge.export.config.model import Overrides
from ppllava_edge.export.config.reader import read_model
from ppllava_edge.export.sources.locate import read_json
from ppllava_edge.export.sources.tensors import Checkpoint

LARGEST_TENSOR = 1 << 24  # numbers
SHARD = "model-00001-of-00001.safetensors"


def read_checkpoint(path: Path, scratch: Path) -> None:
    """List a checkpoint's tensors and load those of a sensible size."""
    (scratch / "model.safetensors").write_bytes(path.read_bytes())
    checkpoint = Checkpoint(scratch)
    for name, shape in checkpoint.shapes.items():
        if np.prod(shape, dtype=float) <= LARGEST_TENSOR:
            checkpoint.load(name)


def read_index(path: Path, scratch: Path) -> None:
    """List the tensors of a checkpoint in several files."""
    (scratch / "model.safetensors.index.json").write_bytes(path.read_bytes())
    (scratch / SHARD).write_bytes((scratch.parent / "bundle" / "embed_tokens.safetensors").read_bytes())
    checkpoint = Checkpoint(scratch)
    expect(all(file.parent == scratch for file in checkpoint.files), "files: outside the checkpoint")


def read_config(path: Path, scratch: Path) -> None:
    """Read a checkpoint's configuration; the question tower's is in it, as "question_config"."""
    (scratch / "config.json").write_bytes(path.read_bytes())
    config = read_json(scratch / "config.json")
    question = config.get("question_config")
    read_model(config, question if isinstance(question, dict) else None, Overrides())


CHECKPOINT_TARGETS: tuple[Target, ...] = (
    Target("checkpoint", read_checkpoint, ".safetensors", "safetensors"),
    Target("index", read_index, ".json", "json", 0.5),
    Target("config", read_config, ".json", "json"),
)
