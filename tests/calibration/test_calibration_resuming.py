"""Calibrations that are interrupted, run out of disk space, or run in pieces."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.exporting import export_options, file_hashes, small_job
from ppllava_edge.calibration import calibrate, observe
from ppllava_edge.calibration.calibrate import quantize_with_data
from ppllava_edge.calibration.model import streamed_model
from ppllava_edge.calibration.model.stage_stream import StageStream
from ppllava_edge.calibration.model.values import DiskValues
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.staging import locked_folder


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


def interrupt_in(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Interrupt the next run when this stage begins, and no run after that."""
    real, left = StageStream.run_segment, [stage]

    def run_segment(self: Any, *arguments: Any) -> Any:
        if self.name in left:
            left.clear()
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(StageStream, "run_segment", run_segment)


def test_another_job_uses_nothing_of_an_interrupted_one(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its values nor its decisions, which lie beside them."""
    options, state, found = export_options(tiny_checkpoint, tmp_path / "b"), tmp_path / ".b.calibration", []
    interrupt_in(monkeypatch, "decoder")
    with pytest.raises(KeyboardInterrupt):
        quantize_with_data(options, small_job(clips))
    assert list(state.glob("*.npz"))

    def begin(*arguments: Any) -> Any:
        found.extend(path.name for path in state.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "_Run", begin)
    with pytest.raises(KeyboardInterrupt):
        quantize_with_data(options, small_job(clips, frames=2))
    assert found == ["job"]


@pytest.mark.slow
def test_a_kill_between_the_decisions_and_the_scales_of_the_cache_changes_nothing(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (export_options(tiny_checkpoint, tmp_path / n, "int8,kv=int8") for n in ("whole", "cut"))
    quantize_with_data(whole, small_job(clips))
    for name in ("save_decisions", "write_json"):
        real, files = getattr(observe, name), list[str]()

        def kill(path: Path, value: Any, real: Any = real, files: list[str] = files) -> None:
            files.append(path.name)
            if path.name in ("decoder-0.npz", "cache.json"):
                raise KeyboardInterrupt
            real(path, value)

        with monkeypatch.context() as patch:
            patch.setattr(observe, name, kill)
            with pytest.raises(KeyboardInterrupt):
                quantize_with_data(cut, small_job(clips))
        assert files
    quantize_with_data(cut, small_job(clips))
    assert file_hashes(tmp_path / "whole") == file_hashes(tmp_path / "cut")


def test_the_state_of_a_finished_calibration_is_removed(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the bundle's last rename and the state's removal, or within that."""
    options = export_options(tiny_checkpoint, tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "_remove_state", lambda state: None)
        quantize_with_data(options, small_job(clips))
    state = tmp_path / ".b.calibration"
    kept = shutil.copytree(state, tmp_path / "kept")
    other = shutil.copytree(state, tmp_path / "other")
    (other / "job").write_text("of another job that is to be continued")
    (tmp_path / "half").mkdir()
    for left, stays in ((kept, False), (other, True), (tmp_path / "half", False)):
        shutil.rmtree(state, ignore_errors=True)
        left.rename(state)
        with pytest.raises(PPLLaVAError, match="exists already"):
            quantize_with_data(options, small_job(clips))
        assert state.exists() == stays, left


def test_a_job_without_videos_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PPLLaVAError, match="is empty"):
        quantize_with_data(export_options(tiny_checkpoint, tmp_path / "b"), small_job(tmp_path / "empty"))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_two_calibrations_of_one_bundle_are_refused(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path
) -> None:
    state = tmp_path / ".b.calibration"
    state.mkdir()
    with locked_folder(state), pytest.raises(PPLLaVAError, match="another command is calibrating"):
        quantize_with_data(export_options(tiny_checkpoint, tmp_path / "b"), small_job(clips))
    assert state.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04" + bytes(2000), b"\0" * 2000])
def test_state_that_a_power_cut_damaged_is_dropped(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    options = export_options(tiny_checkpoint, tmp_path / "b")
    for pattern in ("*.npz", "scratch/values/*.npy"):
        interrupt_in(monkeypatch, "decoder")
        with pytest.raises(KeyboardInterrupt):
            quantize_with_data(options, small_job(clips))
        for path in (tmp_path / ".b.calibration").glob(pattern):
            path.write_bytes(damage)
        with pytest.raises(PPLLaVAError, match=r"is damaged .*starts from the beginning"):
            quantize_with_data(options, small_job(clips))
        assert not (tmp_path / ".b.calibration").exists()


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
