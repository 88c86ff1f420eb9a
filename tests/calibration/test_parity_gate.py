"""The parity gate: its scores, the bundles it refuses, and the layers kept in float so that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.commands import run_command
from helpers.exporting import export_options, small_job
from ppllava_edge.calibration import observe
from ppllava_edge.calibration.calibrate import quantize_with_data
from ppllava_edge.calibration.gate import parity


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_scores_of_equal_and_of_opposite_arrays(seed: int) -> None:
    a = np.random.default_rng(seed).standard_normal((3, 50))
    assert parity.spearman(a, 2 * a + 1) == pytest.approx(1) and parity.spearman(a, -a) == pytest.approx(-1)
    assert parity.divergence(a, a + 5) == pytest.approx(0, abs=1e-9)
    assert (parity.divergence(a, a[::-1]) >= 0).all()
    assert parity.compare(a, a) == (pytest.approx(1), 99.0) and parity.compare(a, -a)[0] == pytest.approx(-1)


def scores(**changes: float) -> parity.Scores:
    good = {
        "feature_cosine": 1.0,
        "feature_sqnr": 40.0,
        "rank_correlation": 1.0,
        "token_cosine": 1.0,
        "token_sqnr": 40.0,
        "divergence": 0.0,
        "agreement": 1.0,
    }
    return parity.Scores(**{**good, **changes}, clips=1, questions=1, positions=1)


@pytest.mark.parametrize("name", ["feature_cosine", "rank_correlation", "token_cosine", "agreement"])
def test_each_score_can_fail_the_gate(name: str) -> None:
    assert not scores().violations(int4=False)
    for value in (0.5, float("nan")):
        assert [limit.score for limit, _ in scores(**{name: value}).violations(int4=False)] == [name]
    assert "divergence" in parity.describe(scores(divergence=1.0).violations(int4=True))


def test_the_gate_refuses_a_broken_bundle(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = observe.choose_group

    def broken(g: Any, layers: Any, stats: Any, precision: str, block: int) -> Any:
        fold, choices = real(g, layers, stats, precision, block)
        for choice in choices:
            if choice.scheme.kind == "w8a8" and g.name == "trunk":
                saturating = choice.scheme.activation_scale / 100
                object.__setattr__(choice.scheme, "activation_scale", saturating)
        return fold, choices

    monkeypatch.setattr(observe, "choose_group", broken)
    with pytest.raises(parity.GateError, match=r"vision: feature cosine 0\.\d+, at least 0.99") as refused:
        quantize_with_data(
            export_options(tiny_checkpoint, tmp_path / "b"), small_job(clips, allow_drift=False, keep_float=0)
        )
    assert refused.value.exit_status == 3
    assert not list(tmp_path.iterdir()), "nothing that looks finished"

    manifest, _, outcome = quantize_with_data(
        export_options(tiny_checkpoint, tmp_path / "b"), small_job(clips, keep_float=0)
    )
    assert manifest.parity is not None and manifest.parity["holds"] is False
    assert "vision" in manifest.parity["drift"]
    assert "does not hold" in (tmp_path / "b" / "report.html").read_text() and not outcome.kept
    info = run_command("ppllava-info", tmp_path / "b")
    assert info.returncode == 0 and "DRIFTS" in info.stdout


def test_the_command_exits_3_when_the_gate_does_not_hold(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path
) -> None:
    """A random model at 4 bits answers differently: its logits are nearly equal."""
    run = run_command(
        "ppllava-export",
        tiny_checkpoint,
        "-o",
        tmp_path / "b",
        "--precision",
        "int4",
        "--calibrate",
        clips,
        "--calibration-frames",
        4,
        "--keep-fp16",
        0,
    )
    assert run.returncode == 3, (run.returncode, run.stderr)
    assert run.stderr.startswith("error: the quantised model drifts")
    assert "decoder" in run.stderr and "--allow-drift" in run.stderr
    assert "Traceback" not in run.stderr and len(run.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_most_sensitive_layers_are_kept(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = parity.Limit("decoder", "divergence", -1.0, False)
    monkeypatch.setattr(parity, "LIMITS", (impossible,))  # so the whole budget is spent
    _, _, outcome = quantize_with_data(
        export_options(tiny_checkpoint, tmp_path / "b"), small_job(clips, keep_float=4)
    )
    assert len(outcome.kept) == 4
    worst = sorted(outcome.sensitivity.values(), reverse=True)[:4]
    assert sorted((outcome.sensitivity[w] for w in outcome.kept), reverse=True) == worst
    told = json.loads((tmp_path / "b" / "report.json").read_text())
    assert {x["layer"] for x in told["layers"] if x["kept"]} == set(outcome.kept)
    assert all(x["kind"] in ("float", "w8") for x in told["layers"] if x["kept"])


def test_scores_that_are_no_numbers_can_be_read_again() -> None:
    """With --allow-drift such a bundle is written: JSON has neither NaN nor infinity."""
    scores = parity.Scores(1.0, -np.inf, 1.0, 1.0, 30.0, np.nan, 1.0, 1, 1, 1)
    assert [limit.score for limit, _ in scores.violations(int4=False)] == ["divergence"]
    written = json.loads(json.dumps(scores.as_dict(), allow_nan=False))
    assert written["divergence"] is None is written["feature_sqnr"] and written["clips"] == 1
