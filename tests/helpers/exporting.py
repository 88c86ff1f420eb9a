"""Exporting a checkpoint that a test may damage, and calibrating a small one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from helpers.commands import run_command
from ppllava_edge.calibration.calibrate import Job
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.export.options import Options
from ppllava_edge.export.quantisation.precision import parse_precision


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


def small_job(clips: Path, **changes: Any) -> Job:
    """A calibration on three clips of four frames; drift is allowed and no layer kept, unless changed."""
    settings = {"folder": clips, "frames": 4, "clips": 3, "allow_drift": True, "keep_float": 0}
    return Job(**{**settings, **changes})


def export_options(checkpoint: Path, output: Path, precision: str = "int8") -> Options:
    """Options of an export whose INT4 blocks fit the tiny checkpoint."""
    return Options(str(checkpoint), output, parse_precision(precision), block=16)


def file_hashes(bundle: Path) -> dict[str, str]:
    """SHA-256 of every file of a bundle but the reports."""
    files = Bundle.open(bundle).manifest.files
    return {name: file.sha256 for name, file in files.items() if "report" not in name}
