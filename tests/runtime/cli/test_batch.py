"""ppllava-run --batch and run_batch: a bad file doesn't stop them; resumable after a kill or a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.commands import SAMPLE, assert_one_line_error, run_command
from ppllava_edge import MediaError, PPLLaVAError, VideoQA
from ppllava_edge.runtime import batch
from ppllava_edge.runtime.batch import read_questions, run_batch, videos_below

QUESTIONS = ["What color is the circle?", "How many objects are there?"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good videos, one of them in a subfolder; a broken one; a hidden one and a text, both ignored."""
    root = tmp_path / "videos"
    (root / "more").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for name in ("a.mp4", "c.mp4", "more/d.mp4", ".hidden/e.mp4"):
        shutil.copy(SAMPLE, root / name)
    (root / "b.mp4").write_bytes(b"not a video")
    (root / "notes.txt").write_text("no video either")
    return root


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.txt"
    path.write_text("# two\n" + "\n".join(QUESTIONS) + "\n\n")
    return path


def pairs(output: Path) -> list[tuple[str, str]]:
    return [(line["video"], line["question"]) for line in map(json.loads, output.read_text().splitlines())]


ALL = [(video, question) for video in ("a.mp4", "b.mp4", "c.mp4", "more/d.mp4") for question in QUESTIONS]


def test_a_folder(folder: Path, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    run = run_command("ppllava-run", "--batch", folder, questions, "-o", output)
    assert run.returncode == 1 and "6 answered, 2 failed" in run.stderr and not run.stdout
    assert pairs(output) == ALL
    lines = dict(zip(ALL, map(json.loads, output.read_text().splitlines())))
    assert lines["more/d.mp4", QUESTIONS[0]]["text"] == "red"
    assert lines["c.mp4", QUESTIONS[1]]["text"] == "three"
    assert "not a video that can be read" in lines["b.mp4", QUESTIONS[0]]["error"]
    again = run_command("ppllava-run", "--batch", folder, questions, "-o", output, "--json")
    assert again.returncode == 0 and json.loads(again.stdout) == {
        "answered": 0,
        "failed": 0,
        "skipped": 8,
        "output": str(output),
    }
    assert pairs(output) == ALL


@pytest.mark.parametrize("cut", [1, 40, 10**9])
def test_a_line_that_was_cut_off_is_written_again(folder: Path, tmp_path: Path, cut: int) -> None:
    """cut: bytes of the third line that a crash left; a huge number means all but the newline."""
    qa, output = VideoQA(device="cpu"), tmp_path / "answers.jsonl"
    run_batch(qa, folder, QUESTIONS, output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][: min(cut, len(lines[2]) - 1)])
    result = run_batch(qa, folder, QUESTIONS, output)
    assert pairs(output) == ALL and (result.skipped, result.answered, result.failed) == (2, 4, 2)


def test_killed_in_the_middle_again_and_again(tmp_path: Path, questions: Path) -> None:
    """No line is written twice and none is lost."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(12):
        shutil.copy(SAMPLE, folder / f"{i:02}.mp4")
    output = tmp_path / "answers.jsonl"
    script = Path(sys.executable).with_name("ppllava-run")
    command = [str(script), "--batch", str(folder), str(questions), "-o", str(output)]
    kills = 0
    while kills < 4:
        lines = output.read_bytes().count(b"\n") if output.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (
            not output.exists() or output.read_bytes().count(b"\n") < lines + 3
        ):
            time.sleep(0.003)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 2
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert pairs(output) == [(f"{i:02}.mp4", question) for i in range(12) for question in QUESTIONS]


def test_two_runs_never_write_to_the_same_file(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    with batch._open_output(output), pytest.raises(PPLLaVAError, match="another run is writing"):
        run_batch(VideoQA(device="cpu"), folder, QUESTIONS, output)


def test_a_full_disk_leaves_whole_lines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, count = tmp_path / "answers.jsonl", 0
    sync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(batch.os, "fsync", full)
    with pytest.raises(PPLLaVAError, match=r"No space left.*run it again to resume"):
        run_batch(VideoQA(device="cpu"), folder, QUESTIONS, output)
    assert len(pairs(output)) == 2
    run_batch(VideoQA(device="cpu"), folder, QUESTIONS, output)
    assert pairs(output) == ALL


def test_questions(tmp_path: Path, questions: Path) -> None:
    assert read_questions(str(questions)) == QUESTIONS and read_questions("What is it?") == ["What is it?"]
    assert read_questions("Why? " * 2000)
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    for name, words in (("empty.txt", "holds no questions"), ("binary.txt", "not a text file")):
        with pytest.raises(MediaError, match=words):
            read_questions(str(tmp_path / name))


def test_bad_folders_options_and_outputs(folder: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="there are no videos below"):
        videos_below(_empty(tmp_path))
    output = tmp_path / "o.jsonl"
    run = run_command("ppllava-run", "--batch", tmp_path / "nothing", questions, "-o", output)
    assert_one_line_error(run, "is not a folder")
    assert_one_line_error(run_command("ppllava-run", "--batch", folder, questions), "-o answers.jsonl")
    assert_one_line_error(run_command("ppllava-run", SAMPLE, "What?", "-o", output), "--batch")
    run = run_command("ppllava-run", "--batch", "--live", folder, questions, "-o", output)
    assert_one_line_error(run, "don't go together")
    output.write_text('{"something": "else"}\n')
    run = run_command("ppllava-run", "--batch", folder, questions, "-o", output)
    assert_one_line_error(run, "line 1 is not a batch answer")
    assert output.read_text() == '{"something": "else"}\n'


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"
