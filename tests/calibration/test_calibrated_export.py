"""Whole calibrations: the bundle, its report, reproducible results, and input that can't be used."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import assert_one_line_error, run_command
from helpers.exporting import export_options, file_hashes, small_job
from ppllava_edge.calibration import data
from ppllava_edge.calibration.calibrate import quantize_with_data
from ppllava_edge.engines.bundle.bundle import Bundle


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
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.parity is not None and "holds" in manifest.parity
    assert json.loads(run.stdout)["parity"] == manifest.parity
    assert manifest.calibration is not None
    assert (manifest.calibration["clips"], manifest.calibration["skipped"]) == (3, 1)
    assert manifest.decoder.kv_dtype == "int8"
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    layers = report["layers"]
    assert "w8a8" in {layer["kind"] for layer in layers}
    assert all(layer["weight_sqnr"] > 25 for layer in layers if layer["kind"] != "float")
    assert [file["file"] for file in report["calibration"]["skipped_files"]] == ["notes.txt"]
    assert any(layer["sensitivity"] is not None for layer in layers)
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


@pytest.mark.slow
def test_the_same_data_give_the_same_bundle(tiny_checkpoint: Path, clips: Path, tmp_path: Path) -> None:
    hashes = []
    for name in "ab":
        quantize_with_data(export_options(tiny_checkpoint, tmp_path / name, "int4"), small_job(clips))
        hashes.append(file_hashes(tmp_path / name))
    assert hashes[0] == hashes[1]


def test_only_the_kv_cache_can_be_int8(tiny_checkpoint: Path, clips: Path, tmp_path: Path) -> None:
    manifest, _, outcome = quantize_with_data(
        export_options(tiny_checkpoint, tmp_path / "b", "fp16,kv=int8"), small_job(clips)
    )
    assert manifest.decoder.kv_dtype == "int8" and not outcome.choices
    assert outcome.scores is not None and outcome.scores.feature_cosine > 0.999


def test_unusable_folders_and_questions_are_refused(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path
) -> None:
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
    assert_one_line_error(run, "are for quantisation")
    run = run_command("ppllava-export", tiny_checkpoint, "-o", tmp_path / "b", "--precision", "int8,kv=int8")
    assert run.returncode == 2 and "kv=int8 needs calibration" in run.stderr


def test_every_fourth_clip_is_held_back() -> None:
    for count, held in ((1, []), (2, [1]), (3, [2]), (4, [3]), (9, [3, 7])):
        made = data.Data([data.Clip(str(i), lambda: np.zeros(0), []) for i in range(count)], "")
        made.hold_back()
        assert [i for i, clip in enumerate(made.clips) if clip.held_back] == held
