"""Fixtures of the export's tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.commands import GOLDEN


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of one golden checkpoint that a test may damage."""
    without_cases = shutil.ignore_patterns("cases")
    return Path(shutil.copytree(GOLDEN / "vicuna_tiny_bt", tmp_path / "checkpoint", ignore=without_cases))
