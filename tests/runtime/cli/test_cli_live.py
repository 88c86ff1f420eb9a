"""ppllava-run --live, as a user types it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest

from helpers.commands import SAMPLE, assert_one_line_error, run_command
from helpers.stream_server import StreamServer, forever

QUESTION, ANSWER = "What color is the circle?", "red"


def run_live(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return run_command("ppllava-run", "--live", *arguments, stdin=stdin)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    with av.open(str(SAMPLE)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_file_in_real_time() -> None:
    run = run_live(SAMPLE, QUESTION, "--fps", "4", "--every", "0.4", "--last", "2")
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and len(lines) >= 3 and lines[-1].endswith(f"] {ANSWER}"), run.stderr
    assert "live: playing" in run.stderr and "live: ended" in run.stderr and "40 frames seen" in run.stderr


def test_a_stream_with_one_question_and_with_typed_ones(frames: np.ndarray) -> None:
    with StreamServer(forever(frames)) as server:
        run = run_live(server.url, QUESTION, "--fps", "10", "--every", "0.2", "--answers", "3", "--json")
        answers = [json.loads(line) for line in run.stdout.splitlines()]
        assert len(answers) == 3 and answers[-1]["text"] == ANSWER
        assert answers[-1]["live"]["state"] == "playing"
        run = run_live(server.url, "--fps", "10", stdin=f"{QUESTION}\n\nHow many objects are there?\n")
        lines = run.stdout.splitlines()
        assert len(lines) == 2 and lines[0].endswith(f"] {ANSWER}"), run.stderr


def test_sources_that_cannot_be_opened_live(tmp_path: Path) -> None:
    refused = run_live("http://127.0.0.1:9/stream", QUESTION, "--no-reconnect")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "nothing was seen" in refused.stderr and "refused" in refused.stderr
    missing = run_live(tmp_path / "nothing.mp4", QUESTION)
    assert_one_line_error(missing, "no such file")
    assert_one_line_error(run_live(SAMPLE, QUESTION, "--frames", "4"), "--frames", "--last")
    assert_one_line_error(run_live(SAMPLE, QUESTION, "--fps", "0"), "fps must be above 0")
