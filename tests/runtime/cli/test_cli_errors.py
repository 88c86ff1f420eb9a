"""ppllava-run with bad input, missing engines, closed pipes and interrupts: one line, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.commands import SAMPLE, assert_one_line_error, run_command

QUESTION, ANSWER = "What color is the circle?", "red"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.mp4", "What?"], "no such file"),
        ([SAMPLE, "   "], "question is empty"),
        ([SAMPLE, "<image>"], "question is empty"),
        ([SAMPLE, "What?", "--frames", "0"], "--frames"),
        ([SAMPLE, "What?", "--frames", "64"], "at most 8"),
        ([SAMPLE, "What?", "--start", "50"], "from 50 s on: it lasts 2.00 s"),
        ([SAMPLE, "What?", "--start", "-1"], "--start"),
        ([SAMPLE, "What?", "--end", "nan"], "--end"),
        ([SAMPLE, "What?", "--model", "nowhere"], "no bundle at nowhere"),
        ([SAMPLE, "What?", "--model", __file__], "is a file"),
        ([SAMPLE, "What?", "--max-new-tokens", "0"], "--max-new-tokens"),
        ([SAMPLE, "What?", "--temperature", "-1"], "temperature"),
        ([SAMPLE, "What?", "--template", "nonsense"], "plain_v1"),
        ([SAMPLE, "what " * 1000], "too many"),
        ([SAMPLE, "What?", "--no-such-option"], "--no-such-option"),
        ([SAMPLE, "What?", "--device", "abacus"], "abacus"),
        ([SAMPLE, "What?", "--save-attention", "/nowhere/map.png"], "/nowhere/map.png"),
        ([Path(__file__), "What?"], "not a video"),
    ],
    ids=lambda value: " ".join(map(str, value))[-40:] if isinstance(value, list) else value,
)
def test_bad_input_gives_a_one_line_error(arguments: list[str], words: str) -> None:
    assert_one_line_error(run_command("ppllava-run", *arguments), words)


def test_cuda_without_a_gpu_is_an_error() -> None:
    run = run_command("ppllava-run", SAMPLE, QUESTION, "--device", "cuda")
    if run.returncode == 0:
        pytest.skip("this machine has a working CUDA card")
    assert_one_line_error(run, "cuda")


def test_an_ids_only_bundle_says_what_it_is(golden_bundle: Path) -> None:
    assert_one_line_error(
        run_command("ppllava-run", SAMPLE, QUESTION, "--model", golden_bundle), "--no-tokenizer"
    )


def test_a_closed_pipe_is_no_error() -> None:
    """ppllava-run … | head -c 1"""
    command = f"{Path(sys.executable).with_name('ppllava-run')} {SAMPLE} 'Describe the video.' | head -c 1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert len(run.stdout) == 1 and "Traceback" not in run.stderr


def test_an_interrupt_is_quiet() -> None:
    script = Path(sys.executable).with_name("ppllava-run")
    process = subprocess.Popen(
        [script, SAMPLE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Children of a test run in the background inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(QUESTION + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == f"{ANSWER}\n"  # it waits for the next question now
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors


def test_without_an_engine_the_first_command_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not installed')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    script = Path(sys.executable).with_name("ppllava-run")
    run = subprocess.run(
        [script, SAMPLE, QUESTION], capture_output=True, text=True, env=environment, timeout=60
    )
    assert_one_line_error(run, "ppllava-edge[cpu]")
