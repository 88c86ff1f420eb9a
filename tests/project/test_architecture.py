"""The picture in docs/development/architecture.md matches the code."""

from __future__ import annotations

import importlib.util
import sys

from helpers.commands import ROOT

_spec = importlib.util.spec_from_file_location(
    "draw_architecture", ROOT / "docs" / "scripts" / "draw_architecture.py"
)
assert _spec and _spec.loader
drawing = importlib.util.module_from_spec(_spec)
sys.modules["draw_architecture"] = drawing  # dataclasses look their module up
_spec.loader.exec_module(drawing)


def test_every_step_is_in_the_code() -> None:
    assert drawing.mistakes() == []


def test_a_step_that_is_not_in_the_code_is_noticed() -> None:
    known = drawing.FRAME[0]
    wrong = [
        drawing.Step(known.file, known.function, "", ("no_such_call",)),
        drawing.Step(known.file, "VideoQA.no_such_method", ""),
    ]
    frame, drawing.FRAME = drawing.FRAME, tuple(wrong)
    try:
        assert len(drawing.mistakes()) == 2
    finally:
        drawing.FRAME = frame


def test_the_picture_is_up_to_date() -> None:
    """If this fails, run python docs/scripts/draw_architecture.py."""
    assert drawing.PICTURE.read_text(encoding="utf-8") == drawing.draw()
