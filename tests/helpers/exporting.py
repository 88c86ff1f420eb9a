"""Exporting a checkpoint that a test may damage."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from helpers.commands import run_command


def export(folder: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    """Export a checkpoint without tokenizers into the folder "bundle" beside it."""
    return run_command("ppllava-export", folder, "-o", folder.parent / "bundle", "--no-tokenizer", *flags)


def change_config(folder: Path, **values: Any) -> None:
    """Set values in a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def nothing_left(folder: Path) -> bool:
    """Whether the checkpoint is alone in its parent folder: no bundle, no staging folder."""
    return {p.name for p in folder.parent.iterdir()} == {folder.name}
