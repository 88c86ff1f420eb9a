"""Calibrations that are interrupted, run out of disk space, or run in pieces."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.exporting import export_options, file_hashes, small_job
from ppllava_edge.calibration.calibrate import quantize_with_data
from ppllava_edge.calibration.model import streamed_model
from ppllava_edge.calibration.model.stage_stream import StageStream
from ppllava_edge.calibration.model.values import DiskValues
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.errors import PPLLaVAError


def test_an_interrupted_run_continues_where_it_stopped(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_with_data(export_options(tiny_checkpoint, tmp_path / "whole"), small_job(clips))
    real, ran = StageStream.run_segment, list[str]()

    def until_the_decoder(self: Any, *arguments: Any) -> Any:
        ran.append(self.name)
        if self.name == "decoder" and "interrupted" not in ran:
            ran.append("interrupted")
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(StageStream, "run_segment", until_the_decoder)
    with pytest.raises(KeyboardInterrupt):
        quantize_with_data(export_options(tiny_checkpoint, tmp_path / "cut"), small_job(clips))
    assert not (tmp_path / "cut").exists() and (tmp_path / ".cut.calibration").is_dir()
    at = len(ran)
    quantize_with_data(export_options(tiny_checkpoint, tmp_path / "cut"), small_job(clips))
    first = next(name for name in ran[at:] if name in ("trunk", "temporal", "decoder"))
    assert first == "decoder", "trunk and temporal branch were not observed again"
    assert file_hashes(tmp_path / "whole") == file_hashes(tmp_path / "cut")
    assert not (tmp_path / ".cut.calibration").exists()


def test_after_a_full_disk_the_run_continues(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = DiskValues.put, 0

    def put(self: Any, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, *arguments)

    monkeypatch.setattr(DiskValues, "put", put)
    with pytest.raises(PPLLaVAError, match=r"is full; free some.*run the command again"):
        quantize_with_data(export_options(tiny_checkpoint, tmp_path / "b"), small_job(clips))
    assert not (tmp_path / "b").exists()
    quantize_with_data(export_options(tiny_checkpoint, tmp_path / "b"), small_job(clips))
    assert Bundle.open(tmp_path / "b").manifest.calibration is not None


@pytest.mark.slow
def test_a_model_in_pieces_gives_the_same_choices(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming layer by layer, as for 7B models, gives the same decisions as running whole stages."""
    quantize_with_data(export_options(tiny_checkpoint, tmp_path / "whole"), small_job(clips, keep_float=0))
    monkeypatch.setattr(streamed_model, "SMALL_BYTES", 0)
    monkeypatch.setattr(streamed_model, "SEGMENT_BYTES", 1)
    _, _, outcome = quantize_with_data(
        export_options(tiny_checkpoint, tmp_path / "pieces"), small_job(clips, keep_float=0)
    )
    assert not outcome.sensitivity and outcome.scores is not None
    whole, pieces = (
        json.loads((tmp_path / name / "report.json").read_text())["layers"] for name in ("whole", "pieces")
    )
    for a, b in zip(whole, pieces):
        assert (a["layer"], a["kind"]) == (b["layer"], b["kind"])
        if a["activation_scale"]:
            assert a["activation_scale"] == pytest.approx(b["activation_scale"], rel=0.3)
