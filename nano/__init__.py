"""Nano: the small trained model that is packed with ppllava-edge. docs/nano.md tells what it can and can't do."""

from __future__ import annotations

from pathlib import Path


def bundle_path() -> Path:
    """Directory of the packed bundle."""
    return Path(__file__).resolve().parent / "bundle"
