"""The packed bundle nano as the source of an export."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from helpers.commands import ROOT, assert_one_line_error, run_command
from ppllava_edge.calibration.calibrate import Job
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.integrity import write_manifest
from ppllava_edge.engines.bundle.manifest import MANIFEST
from ppllava_edge.engines.bundle.manifest_parser import read_manifest
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.export.cli import main
from ppllava_edge.export.options import Options
from ppllava_edge.nano.calibration_clips import drawn


@pytest.mark.parametrize("at_root", [True, False], ids=["repository root", "elsewhere"])
def test_nano_is_the_packed_bundle(tmp_path: Path, at_root: bool) -> None:
    """Even if a folder named nano exists and holds no bundle, as in the repository's root."""
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


@pytest.mark.parametrize("name", ["main_graph", "../../escaped"])
def test_a_graph_inside_a_bundle_may_have_any_name(tmp_path: Path, name: str) -> None:
    """Files are named after stages, not after the graph's own name, which other tools change."""
    source, output = tmp_path / "source", tmp_path / "a" / "b" / "output"
    shutil.copytree(packed_bundle(), source)
    output.parent.mkdir(parents=True)
    model = onnx.load(source / "trunk.onnx", load_external_data=False)
    model.graph.name = name
    (source / "trunk.onnx").write_bytes(model.SerializeToString())
    write_manifest(source, Bundle(source, read_manifest(source / MANIFEST)).manifest)
    flags = ("--precision", "int8", "--weight-only", "--no-engine")
    run = run_command("ppllava-export", source, "-o", output, *flags)
    assert run.returncode == 0, run.stderr
    assert Bundle.open(output, verify=True).manifest.precision["vision"] == "int8"
    assert not list(tmp_path.rglob("*escaped*"))
