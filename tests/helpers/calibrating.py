"""Calibration jobs of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppllava_edge.calibration.calibrate import Job
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.export.options import Options
from ppllava_edge.export.quantisation.precision import parse_precision


def small_job(clips: Path, **changes: Any) -> Job:
    """Three clips of four frames; drift is allowed and nothing is kept in float, unless changed."""
    settings = {"folder": clips, "frames": 4, "clips": 3, "allow_drift": True, "keep_float": 0}
    return Job(**{**settings, **changes})


def export_options(checkpoint: Path, output: Path, precision: str = "int8") -> Options:
    """Options of an export whose INT4 blocks fit the tiny checkpoint."""
    return Options(str(checkpoint), output, parse_precision(precision), block=16)


def file_hashes(bundle: Path) -> dict[str, str]:
    """SHA-256 of every file of a bundle but the reports."""
    files = Bundle.open(bundle).manifest.files
    return {name: file.sha256 for name, file in files.items() if "report" not in name}
