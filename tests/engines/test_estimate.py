"""Predicted sizes, compared with the sizes of exported bundles."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.commands import assert_one_line_error, run_command
from ppllava_edge.bench.models.random_checkpoint import TINY, write_random_checkpoint
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.machine.estimate import parse_size


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 80 million parameters: large enough that a bundle is mostly weights."""
    folder = tmp_path_factory.mktemp("middling") / "checkpoint"
    shape = replace(
        TINY,
        vision=256,
        vision_mlp=1024,
        question=256,
        question_mlp=1024,
        question_heads=8,
        decoder=1024,
        decoder_mlp=2816,
        decoder_heads=8,
        decoder_layers=4,
        vocab=8192,
    )
    write_random_checkpoint(folder, shape)
    return folder


@pytest.mark.parametrize(
    "precision", ["int4", *(pytest.param(p, marks=pytest.mark.slow) for p in ("fp32", "fp16", "int8"))]
)
def test_the_bundle_has_the_predicted_size(middling: Path, tmp_path: Path, precision: str) -> None:
    run = run_command("ppllava-export", middling, "--precision", precision, "--dry-run", "--json")
    assert run.returncode == 0, run.stderr
    predicted = json.loads(run.stdout)
    assert predicted["frames"] == 16 and predicted["export"] > 0
    assert predicted["run"] > predicted["cache"] > 0
    assert not list(tmp_path.iterdir())
    run = run_command("ppllava-export", middling, "-o", tmp_path / "b", "--precision", precision)
    assert run.returncode == 0, run.stderr
    measured = sum(path.stat().st_size for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert predicted["bundle"] == pytest.approx(measured, rel=0.15), (precision, measured)
    info = run_command("ppllava-info", tmp_path / "b", "--fit", "4GB", "--json")
    assert info.returncode == 0, info.stderr
    again = json.loads(info.stdout)
    assert again["run"] == pytest.approx(predicted["run"], rel=0.15) and "it fits" in again["advice"][0]
    assert Bundle.open(tmp_path / "b").manifest.parity is None


def test_advice(middling: Path) -> None:
    run = run_command("ppllava-export", middling, "--precision", "fp32", "--dry-run", "--fit", "350 MB")
    assert run.returncode == 0, run.stderr
    assert "it doesn't fit 350.0 MB" in run.stdout and "--precision int4" in run.stdout, run.stdout
    run = run_command("ppllava-export", middling, "--dry-run", "--fit", "1MB")
    assert "no option makes it fit" in run.stdout
    assert_one_line_error(
        run_command("ppllava-export", middling, "--dry-run", "--fit", "large"), "'large' is not a size"
    )
    assert_one_line_error(run_command("ppllava-export", middling), "-o", "--dry-run")


def test_sizes() -> None:
    assert parse_size("8GB") == 8e9
    assert parse_size("500 MB") == 5e8
    assert parse_size("2GiB") == 2 * 2**30
    assert parse_size("123") == 123
    for wrong in ("", "GB", "-1GB", "0", "8 apples"):
        with pytest.raises(PPLLaVAError, match="is not a size"):
            parse_size(wrong)
