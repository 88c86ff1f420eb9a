"""The packed bundle nano as the source of an export."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.commands import ROOT, assert_one_line_error, run_command
from ppllava_edge.calibration.calibrate import Job
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.export.cli import main
from ppllava_edge.export.options import Options
from ppllava_edge.nano.calibration_clips import drawn


@pytest.mark.parametrize("at_root", [True, False], ids=["repository root", "elsewhere"])
def test_nano_is_the_packed_bundle(tmp_path: Path, at_root: bool) -> None:
    """Also where a folder is called nano and holds no bundle, as in the repository's root."""
    output = tmp_path / "quantised"
    flags = ("--precision", "int8", "--weight-only", "--no-engine")
    run = run_command("ppllava-export", "nano", "-o", output, *flags, cwd=ROOT if at_root else tmp_path)
    assert run.returncode == 0, run.stderr
    manifest = Bundle.open(output).manifest
    assert manifest.name == "nano" and manifest.precision["decoder"] == "int8"
    assert manifest.checkpoint == Bundle.open(packed_bundle()).manifest.checkpoint


def test_nano_is_calibrated_on_generated_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []

    def calibrate(options: Options, job: Job, progress: object) -> None:
        jobs.append(job)
        raise PPLLaVAError("far enough")

    monkeypatch.setattr("ppllava_edge.calibration.calibrate.quantize_with_data", calibrate)
    monkeypatch.chdir(ROOT)
    for more in ((), ("--calibrate", str(tmp_path))):
        arguments = ["nano", "-o", str(tmp_path / "quantised"), "--precision", "int8", *more]
        assert "far enough" in CliRunner().invoke(main, arguments).output
    generated, given = jobs
    assert generated.drawn is drawn and generated.folder is None
    assert given.drawn is None and given.folder == tmp_path


def test_a_checkpoint_in_a_folder_called_nano_is_exported(tmp_path: Path) -> None:
    folder = tmp_path / "nano"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    run = run_command("ppllava-export", "nano", "-o", tmp_path / "bundle", cwd=tmp_path)
    assert_one_line_error(run, "not a PPLLaVA or PLLaVA checkpoint")
