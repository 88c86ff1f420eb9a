"""Calibration: what is observed, what is decided, the gate that judges, the report, and runs that are cut off."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.commands import assert_one_line_error, run_command
from ppllava_edge.calibration import calibrate, data, parity
from ppllava_edge.calibration.calibrate import Job, quantize_with_data
from ppllava_edge.calibration.statistics import InputStatistics, ranges
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.export.quantisation.precision import parse_precision
from ppllava_edge.export.sources import Options
from ppllava_edge.runtime.media.writing import write_video


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, moving_frames: np.ndarray) -> Path:
    """Three small videos and a file that is none."""
    folder = tmp_path_factory.mktemp("clips")
    for k in range(3):
        write_video(folder / f"{k}.mp4", np.roll(moving_frames, 9 * k, axis=2), fps=12)
    (folder / "notes.txt").write_text("not a video")
    return folder


def job(clips: Path, **changes: Any) -> Job:
    return Job(**{"folder": clips, "frames": 4, "clips": 3, "allow_drift": True, "keep_float": 0, **changes})


def options(checkpoint: Path, output: Path, precision: str = "int8") -> Options:
    return Options(str(checkpoint), output, parse_precision(precision), block=16)


# -- statistics ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_streamed_statistics_are_those_of_everything(lengths: list[int], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal((1, n, width)).astype(np.float32) for n in lengths]
    stats = InputStatistics("layer", len(parts))
    for part in parts:
        stats.add(part)
    everything = np.concatenate(parts, axis=1)[0]
    np.testing.assert_array_equal(stats.largest, np.abs(everything).max(axis=0))
    np.testing.assert_allclose(
        stats.mean_squares, np.square(everything, dtype=np.float64).mean(axis=0), rtol=1e-6
    )
    rows = {row.tobytes() for row in everything}
    assert len(stats.rows) and all(row.tobytes() in rows for row in stats.rows)


def test_activations_that_are_not_finite_are_named() -> None:
    with pytest.raises(PPLLaVAError, match=r"blocks\.3.*not finite"):
        InputStatistics("blocks.3", 1).add(np.array([[1.0, np.nan]], np.float32))


def test_constant_activations_have_no_range() -> None:
    stats = InputStatistics("layer", 1)
    stats.add(np.zeros((4, 3), np.float32))
    assert stats.constant


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=30)
def test_every_range_lies_within_the_data(seed: int, size: float) -> None:
    x = np.abs(np.random.default_rng(seed).standard_normal(2000)) * size
    found = ranges(x, float(x.max()))
    assert {"max", "mse", "entropy", "percentile 99.9", "percentile 99.99"} == set(found)
    assert found["max"] == x.max() and all(0 < value <= x.max() * 1.001 for value in found.values())


def test_mse_cuts_a_tail_that_max_would_keep() -> None:
    x = np.abs(np.random.default_rng(0).standard_normal(100_000))
    x[0] = 200
    found = ranges(x, 200.0)
    assert found["mse"] < 180 and found["percentile 99.99"] < 10 < found["max"]


# -- scores ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_scores_of_the_same_and_of_the_opposite(seed: int) -> None:
    a = np.random.default_rng(seed).standard_normal((3, 50))
    assert parity.spearman(a, 2 * a + 1) == pytest.approx(1) and parity.spearman(a, -a) == pytest.approx(-1)
    assert (
        parity.divergence(a, a + 5) == pytest.approx(0, abs=1e-9)
        and (parity.divergence(a, a[::-1]) >= 0).all()
    )
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


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_a_calibrated_bundle_and_its_report(tiny_checkpoint: Path, clips: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("# comment\nWhat is it?\tA square.\n\nWhere?\n")
    run = run_command(
        "ppllava-export",
        tiny_checkpoint,
        "-o",
        tmp_path / "b",
        "--precision",
        "int8,kv=int8",
        "--calibrate",
        clips,
        "--questions",
        questions,
        "--calibration-frames",
        4,
        "--allow-drift",
        "--json",
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    bundle = Bundle.open(tmp_path / "b")
    assert (
        said["parity"] == bundle.manifest.parity
        and bundle.manifest.parity is not None
        and "holds" in bundle.manifest.parity
    )
    assert (
        bundle.manifest.calibration is not None
        and bundle.manifest.calibration["clips"] == 3
        and bundle.manifest.calibration["skipped"] == 1
    )
    assert bundle.manifest.decoder.kv_dtype == "int8"
    told = json.loads((tmp_path / "b" / "report.json").read_text())
    kinds = {x["kind"] for x in told["layers"]}
    assert "w8a8" in kinds and all(x["weight_sqnr"] > 25 for x in told["layers"] if x["kind"] != "float")
    assert [x["file"] for x in told["calibration"]["skipped_files"]] == ["notes.txt"]
    assert any(x["sensitivity"] is not None for x in told["layers"])
    page = (tmp_path / "b" / "report.html").read_text()
    assert not re.search(r"(src|href)=|url\(|@import|https?:", page), "the page loads nothing"
    assert page.count("<svg") >= 3 and "notes.txt" in page
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "nothing is left beside it"
    answer = run_command(
        "ppllava-run",
        clips / "0.mp4",
        "What is it?",
        "--model",
        tmp_path / "b",
        "--frames",
        4,
        "--max-new-tokens",
        4,
    )
    assert answer.returncode == 0, answer.stderr


def test_the_same_data_give_the_same_bundle(tiny_checkpoint: Path, clips: Path, tmp_path: Path) -> None:
    hashes = []
    for name in "ab":
        quantize_with_data(options(tiny_checkpoint, tmp_path / name, "int4"), job(clips))
        hashes.append(
            {n: f.sha256 for n, f in Bundle.open(tmp_path / name).manifest.files.items() if "report" not in n}
        )
    assert hashes[0] == hashes[1]


def test_the_gate_refuses_a_bundle_that_was_broken_on_purpose(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = calibrate.choose_group

    def broken(g: Any, layers: Any, stats: Any, precision: str, block: int) -> Any:
        fold, choices = real(g, layers, stats, precision, block)
        for choice in choices:
            if choice.scheme.kind == "w8a8" and g.name == "trunk":
                object.__setattr__(
                    choice.scheme, "activation_scale", choice.scheme.activation_scale / 100
                )  # everything saturates
        return fold, choices

    monkeypatch.setattr(calibrate, "choose_group", broken)
    with pytest.raises(parity.GateError, match=r"vision: feature cosine 0\.\d+, at least 0.99") as refused:
        quantize_with_data(
            options(tiny_checkpoint, tmp_path / "b"), job(clips, allow_drift=False, keep_float=0)
        )
    assert refused.value.exit_status == 3
    assert not list(tmp_path.iterdir()), "nothing that looks finished"

    manifest, _, outcome = quantize_with_data(
        options(tiny_checkpoint, tmp_path / "b"), job(clips, keep_float=0)
    )
    assert (
        manifest.parity is not None
        and manifest.parity["holds"] is False
        and "vision" in manifest.parity["drift"]
    )
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
    assert (
        run.stderr.startswith("error: the quantised model drifts")
        and "decoder" in run.stderr
        and "--allow-drift" in run.stderr
    )
    assert (
        "Traceback" not in run.stderr
        and len(run.stderr.strip().splitlines()) == 1
        and not list(tmp_path.iterdir())
    )


def test_layers_that_hurt_are_kept(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        parity, "LIMITS", (parity.Limit("decoder", "divergence", -1.0, False),)
    )  # can't hold: the whole budget is spent
    _, _, outcome = quantize_with_data(options(tiny_checkpoint, tmp_path / "b"), job(clips, keep_float=4))
    assert len(outcome.kept) == 4
    worst = sorted(outcome.sensitivity.values(), reverse=True)[:4]
    assert sorted((outcome.sensitivity[w] for w in outcome.kept), reverse=True) == worst
    told = json.loads((tmp_path / "b" / "report.json").read_text())
    assert {x["layer"] for x in told["layers"] if x["kept"]} == set(outcome.kept)
    assert all(x["kind"] in ("float", "w8") for x in told["layers"] if x["kept"])


def test_an_interrupted_run_goes_on_where_it_was(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ppllava_edge.calibration.stream import StageStream

    quantize_with_data(options(tiny_checkpoint, tmp_path / "whole"), job(clips))
    real, ran = StageStream.run_segment, list[str]()

    def until_the_decoder(self: Any, *arguments: Any) -> Any:
        ran.append(self.name)
        if self.name == "decoder" and "interrupted" not in ran:
            ran.append("interrupted")
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(StageStream, "run_segment", until_the_decoder)
    with pytest.raises(KeyboardInterrupt):
        quantize_with_data(options(tiny_checkpoint, tmp_path / "cut"), job(clips))
    assert not (tmp_path / "cut").exists() and (tmp_path / ".cut.calibration").is_dir()
    at = len(ran)
    quantize_with_data(options(tiny_checkpoint, tmp_path / "cut"), job(clips))
    first = next(name for name in ran[at:] if name in ("trunk", "temporal", "decoder"))
    assert first == "decoder", "trunk and temporal branch were not observed again"
    hashes = [
        {n: f.sha256 for n, f in Bundle.open(tmp_path / name).manifest.files.items() if "report" not in n}
        for name in ("whole", "cut")
    ]
    assert hashes[0] == hashes[1] and not (tmp_path / ".cut.calibration").exists()


def test_a_model_in_pieces_is_the_model(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming layer by layer, as at 7B, decides what running whole stages decides."""
    from ppllava_edge.calibration import reference

    quantize_with_data(options(tiny_checkpoint, tmp_path / "whole"), job(clips, keep_float=0))
    monkeypatch.setattr(reference, "SMALL_BYTES", 0)
    monkeypatch.setattr(reference, "SEGMENT_BYTES", 1)
    _, _, outcome = quantize_with_data(
        options(tiny_checkpoint, tmp_path / "pieces"), job(clips, keep_float=0)
    )
    assert not outcome.sensitivity and outcome.scores is not None
    whole, pieces = (
        json.loads((tmp_path / name / "report.json").read_text())["layers"] for name in ("whole", "pieces")
    )
    for a, b in zip(whole, pieces):
        assert (a["layer"], a["kind"]) == (b["layer"], b["kind"])
        if a["activation_scale"]:
            assert a["activation_scale"] == pytest.approx(b["activation_scale"], rel=0.3)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_folders_that_can_not_be_used(tiny_checkpoint: Path, clips: Path, tmp_path: Path) -> None:
    empty, useless = tmp_path / "empty", tmp_path / "useless"
    empty.mkdir()
    useless.mkdir()
    shutil.copy(clips / "notes.txt", useless)
    (useless / "zero.mp4").write_bytes(b"")
    nothing = tmp_path / "none.txt"
    nothing.write_text("# only a comment\n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    for arguments, words in (
        (("--calibrate", tmp_path / "nowhere"), ("no such directory",)),
        (("--calibrate", empty), ("is empty",)),
        (("--calibrate", useless), ("none of 2 files", "notes.txt")),
        (("--calibrate", clips, "--questions", nothing), ("holds no question",)),
        (("--calibrate", clips, "--questions", tmp_path / "x"), ("can't be read",)),
        (("--calibrate", clips, "--questions", binary), ("can't be read",)),
        (("--calibrate", clips, "--calibration-frames", "999"), ("at most 16",)),
        (("--calibrate", clips, "--no-tokenizer"), ("--no-tokenizer",)),
    ):
        run = run_command(
            "ppllava-export", tiny_checkpoint, "-o", tmp_path / "b", "--precision", "int8", *arguments
        )
        assert_one_line_error(run, *words)
        assert not (tmp_path / "b").exists()
    run = run_command(
        "ppllava-export", tiny_checkpoint, "-o", tmp_path / "b", "--precision", "fp16", "--calibrate", clips
    )
    assert_one_line_error(run, "are for integers")
    run = run_command("ppllava-export", tiny_checkpoint, "-o", tmp_path / "b", "--precision", "int8,kv=int8")
    assert run.returncode == 2 and "kv=int8 needs calibration" in run.stderr


def test_every_fourth_clip_judges() -> None:
    for count, held in ((1, []), (2, [1]), (3, [2]), (4, [3]), (9, [3, 7])):
        made = data.Data([data.Clip(str(i), lambda: np.zeros(0), []) for i in range(count)], "")
        made.hold_back()
        assert [i for i, clip in enumerate(made.clips) if clip.held_back] == held


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from ppllava_edge.calibration.stream import Values

    real, count = Values.put, 0

    def put(self: Any, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, *arguments)

    monkeypatch.setattr(Values, "put", put)
    with pytest.raises(PPLLaVAError, match=r"is full; free some.*it goes on"):
        quantize_with_data(options(tiny_checkpoint, tmp_path / "b"), job(clips))
    assert not (tmp_path / "b").exists()
    quantize_with_data(options(tiny_checkpoint, tmp_path / "b"), job(clips))
    assert Bundle.open(tmp_path / "b").manifest.calibration is not None


def test_values_come_back_as_they_went(tmp_path: Path) -> None:
    from ppllava_edge.calibration.stream import Values

    values = Values(tmp_path / "v")
    for array in (
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.zeros((1, 0, 4), np.float32),
        np.array([5]),
        np.ones((2, 3), np.float16).T,
    ):
        values.put(1, "layers/x", array)
        got = values.get(1, "layers/x")
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)
    values.drop(1, "layers/x")
    assert not values.has(1, "layers/x")


def test_a_cache_alone_can_be_int8(tiny_checkpoint: Path, clips: Path, tmp_path: Path) -> None:
    manifest, _, outcome = quantize_with_data(
        options(tiny_checkpoint, tmp_path / "b", "fp16,kv=int8"), job(clips)
    )
    assert (
        manifest.decoder.kv_dtype == "int8"
        and not outcome.choices
        and outcome.scores is not None
        and outcome.scores.feature_cosine > 0.999
    )
