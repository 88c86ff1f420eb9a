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
from ppllava_edge.engines.errors import PromptError
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
    assert again.returncode == 1 and json.loads(again.stdout) == {
        "answered": 0,
        "failed": 0,
        "skipped": 8,
        "failed_before": 2,
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
        if count == 4:  # the first syncs the new name of the file
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


OURS = b'{"video": "a.mp4", "question": "What?", "text": "red"}'
FOREIGN = [
    b'{"name": "settings", "values": [1, 2, 3]}',
    b"a note without a final newline",
    b'{"video": "a.mp4", "label": 3}',
    b'{"video": "a.mp4", "question": "What?", "answer": "red"}',
    b'{"video": 3',
    b"[" * 100_000,
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda data: data[:40].decode())
@pytest.mark.parametrize("before", [b"", OURS + b"\n"], ids=["alone", "behind an answer"])
def test_a_foreign_output_is_never_changed(
    folder: Path, tmp_path: Path, before: bytes, foreign: bytes
) -> None:
    output = tmp_path / "file"
    for end in (b"", b"\n"):
        output.write_bytes(before + foreign + end)
        with pytest.raises(PPLLaVAError, match=r"line \d is not a batch answer"), batch._open_output(output):
            pass
        assert output.read_bytes() == before + foreign + end


@pytest.mark.parametrize("before", [b"", OURS + b"\n"], ids=["alone", "behind an answer"])
def test_every_beginning_of_an_answer_is_removed(tmp_path: Path, before: bytes) -> None:
    line = batch.json.dumps(
        {"video": 'a "q" \\ é.mp4', "question": 'Why "so"?', "error": "é"}, ensure_ascii=False
    )
    output = tmp_path / "answers.jsonl"
    for cut in range(len(line.encode())):
        output.write_bytes(before + line.encode()[:cut])
        with batch._open_output(output) as (_, written):
            assert len(written) == bool(before)
        assert output.read_bytes() == before


def test_zeros_of_a_power_cut_are_removed_behind_answers_only(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    for cut in (0, 20):
        output.write_bytes(OURS + b"\n" + OURS[:cut] + b"\0" * 50)
        with batch._open_output(output):
            pass
        assert output.read_bytes() == OURS + b"\n"
    output.write_bytes(b"\0" * 50)
    with pytest.raises(PPLLaVAError, match="line 1 is not"), batch._open_output(output):
        pass
    assert output.read_bytes() == b"\0" * 50


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_LINE_BYTES", 64)
    output = tmp_path / "answers.jsonl"
    output.write_bytes(OURS[:-2] + b"x" * 100 + b'"}\n' + OURS + b"\n")
    with pytest.raises(PPLLaVAError, match="line 1 is not"), batch._open_output(output):
        pass
    assert output.read_bytes().endswith(OURS + b"\n")


def test_only_regular_files_are_outputs(folder: Path, tmp_path: Path) -> None:
    """A link to a file is followed; a FIFO would block, a device may act, a folder is none."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "answers.jsonl")
    for name in ("pipe", "folder", "/dev/null", "/dev/zero"):
        with pytest.raises(PPLLaVAError, match="not a regular file"), batch._open_output(tmp_path / name):
            pass
    with pytest.raises(PPLLaVAError, match="can't write"), batch._open_output(tmp_path / "no" / "folder"):
        pass
    with batch._open_output(tmp_path / "link"):
        pass
    assert (tmp_path / "folder" / "answers.jsonl").is_file()


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    """It is shown with escapes, kept in hex, and found again; a file of the same escaped name is another."""
    root, output = tmp_path / "videos", tmp_path / "answers.jsonl"
    root.mkdir()
    names = [os.fsdecode(b"a\xff.mp4"), "a\\xff.mp4", os.fsdecode(b"b\xfe.mp4")]
    for name in names[:2]:
        shutil.copy(SAMPLE, root / name)
    (root / names[2]).write_bytes(b"not a video")
    qa = VideoQA(device="cpu")
    result = run_batch(
        qa, root, QUESTIONS[:1], output, progress=lambda name, done, total: name.encode() and None
    )
    assert (result.answered, result.failed) == (2, 1)
    lines = [json.loads(line) for line in output.read_bytes().decode().splitlines()]
    assert [line["video"] for line in lines] == ["a\\xff.mp4", "a\\xff.mp4", "b\\xfe.mp4"]
    assert sorted(line.get("video_bytes", "") for line in lines) == [
        "",
        b"a\xff.mp4".hex(),
        b"b\xfe.mp4".hex(),
    ]
    assert run_batch(qa, root, QUESTIONS[:1], output).skipped == 3


def test_questions_of_the_api_are_cleaned(folder: Path, tmp_path: Path) -> None:
    """An answer's line has the question as it was asked, so a resumed run must look for that."""
    qa, output = VideoQA(device="cpu"), tmp_path / "answers.jsonl"
    assert run_batch(qa, folder, [f" {QUESTIONS[0]}\n", QUESTIONS[0]], output).answered == 3
    assert run_batch(qa, folder, f" {QUESTIONS[0]}\n", output).skipped == 4
    with pytest.raises(PromptError):
        run_batch(qa, folder, ["  "], output)


def test_old_errors_are_counted_and_asked_again(folder: Path, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    command = ("ppllava-run", "--batch", folder, questions, "-o", output)
    assert run_command(*command).returncode == 1
    again = run_command(*command)
    assert again.returncode == 1 and "2 of them failed; --retry asks them again" in again.stderr
    shutil.copy(SAMPLE, folder / "b.mp4")
    retried = run_command(*command, "--retry", "--json")
    want = {"answered": 2, "failed": 0, "skipped": 6, "failed_before": 0, "output": str(output)}
    assert retried.returncode == 0 and json.loads(retried.stdout) == want
    assert pairs(output) == [*ALL, *ALL[2:4]] and run_command(*command).returncode == 0


def test_a_mistyped_file_of_questions(tmp_path: Path) -> None:
    for name in ("question.txt", "my questions.jsonl", f"{tmp_path}/questions", "lists/objects"):
        with pytest.raises(MediaError, match="no such file of questions"):
            read_questions(name)
    with pytest.raises(MediaError, match="can't be read: Is a directory"):
        read_questions(str(tmp_path))
    for question in ("Is it on the left/right?", "left / right", "Which number, 1/2 or 3/4?"):
        assert read_questions(question) == [question]
    run = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{PIPED}' <(printf 'One?\nTwo?\n')"],
        capture_output=True,
        text=True,
    )
    assert run.stdout == "['One?', 'Two?']\n", run.stderr


PIPED = (
    "import sys; from ppllava_edge.runtime.batch import read_questions; print(read_questions(sys.argv[1]))"
)
