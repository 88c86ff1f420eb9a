"""Nano, the small trained model that is packed with ppllava-edge: its world, training and evaluation.

Imports calibration/, export/, runtime/ and engines/; imported by bench/ and export's command line.
docs/nano.md says what the model can and can't do.
"""

from __future__ import annotations

from pathlib import Path


def sample_path() -> Path:
    """The packed sample clip: a red circle moves right, a blue square rests, a yellow cross flashes up."""
    return Path(__file__).resolve().parent / "sample" / "shapes.mp4"
