"""ppllava-run refuses options that it would ignore; errors name options; streams may be closed or full."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from helpers.commands import SAMPLE, assert_one_line_error, run_command
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.terminal import Command, option

QUESTION, ANSWER = "What color is the circle?", "red"
SCRIPT = str(Path(sys.executable).with_name("ppllava-run"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([SAMPLE, QUESTION, "--answers", "3"], ("--answers", "goes with --live")),
        ([SAMPLE, QUESTION, "--every", "5.0"], ("--every", "goes with --live")),  # the default, but given
        ([SAMPLE, QUESTION, "--fps", "4"], ("--fps", "goes with --live")),
        ([SAMPLE, QUESTION, "--window", "4"], ("--window", "goes with --live")),
        ([SAMPLE, QUESTION, "--last", "4"], ("--last", "goes with --live")),
        ([SAMPLE, "--no-reconnect"], ("--no-reconnect", "goes with --live")),
        ([SAMPLE, "--live", "--every", "1"], ("--every", "give one")),
        ([SAMPLE, "--live", QUESTION, "--cache"], ("--cache", "--live don't go together")),
        ([SAMPLE, "--live", QUESTION, "--candidates", "9"], ("--candidates", "--live don't go together")),
        ([SAMPLE, "--live", QUESTION, "--start", "1"], ("--start", "--last says how far")),
        ([SAMPLE, QUESTION, "--retry"], ("--retry", "goes with --batch")),
        ([SAMPLE, QUESTION, "--batch", "-o", "-"], ("-o needs a file",)),
        ([SAMPLE, QUESTION, "--limit", "memory=1e9"], ("--limit memory goes with --isolate",)),
        ([SAMPLE, QUESTION, "--candidates", "9"], ("--candidates", "--select guided")),
        ([SAMPLE, QUESTION, "--top-p", "0.5"], ("--top-p", "--temperature above 0")),
        ([SAMPLE, QUESTION, "--seed", "0"], ("--seed", "--temperature above 0")),
        ([SAMPLE, QUESTION, "--keep", "tokens"], ("--keep", "several questions")),
        ([SAMPLE, QUESTION, "--limit", "max_sides=4"], ("max_sides",)),
        ([SAMPLE, QUESTION, "--limit", "max_side=4"], ("4",)),
        ([SAMPLE, QUESTION, "--candidates", "0", "--select", "guided"], ("error: --candidates must be",)),
        ([SAMPLE, QUESTION, "--frames", "64"], ("use --frames 8 or fewer",)),
        ([SAMPLE, QUESTION, "--engine", "cuda", "--device", "cpu"], ("use --device cuda",)),
    ],
    ids=lambda value: " ".join(value[2:] if value[0] is SAMPLE else value),
)
def test_an_option_that_would_be_ignored_is_refused(arguments: list[str], words: tuple[str, ...]) -> None:
    assert_one_line_error(run_command("ppllava-run", *arguments), *words)


def test_an_answer_that_its_timeout_ended_has_a_note() -> None:
    run = run_command("ppllava-run", SAMPLE, QUESTION, "--timeout", "0.001")
    assert run.returncode == 0 and "note: --timeout 0.001 ended the answer" in run.stderr


@pytest.mark.parametrize("name", ["/nowhere/map.png", "map.jpg", "folder", "read-only/map.png"])
def test_an_attention_map_that_cannot_be_written_is_refused_before_the_answer(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "read-only").mkdir(mode=0o500)
    if name.startswith("read-only") and os.geteuid() == 0:
        pytest.skip("root may write into every folder")
    run = run_command("ppllava-run", SAMPLE, QUESTION, "--save-attention", tmp_path / name)
    assert_one_line_error(run, Path(name).name)


def test_arguments_in_errors_become_options() -> None:
    @click.command(cls=Command)
    @option("--max-new-tokens", type=int)
    @option("--device")
    def command(**options: object) -> None:
        """A command."""

    texts = {
        "max_new_tokens must be 1 or more": "--max-new-tokens must be 1 or more",
        "no GPU was found; use device=cpu": "no GPU was found; use --device cpu",
        "no such file: /a/device=x.mp4": "no such file: /a/device=x.mp4",
        "device names begin with cam": "device names begin with cam",
        "frames must be 1 or more": "frames must be 1 or more",  # not an option of this command
    }
    assert isinstance(command, Command)
    assert {text: command.with_options(text) for text in texts} == texts


def test_a_log_and_an_answer_stay_apart() -> None:
    run = subprocess.run(
        [SCRIPT, SAMPLE, QUESTION, "-v"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert ANSWER in run.stdout.splitlines() and "ppllava_edge" in run.stdout


@pytest.mark.parametrize("mode", [[], ["--live"]], ids=["chat", "live"])
def test_bytes_that_are_no_text_are_one_line(mode: list[str]) -> None:
    run = subprocess.run(
        [SCRIPT, SAMPLE, *mode], input=b"What \xff is it?\n", capture_output=True, timeout=60, env=utf8()
    )
    assert run.returncode == 2 and b"Traceback" not in run.stderr and run.stderr.count(b"error: ") == 1


def utf8() -> dict[str, str]:
    return {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"}


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    run = subprocess.run(
        ["bash", "-c", f"{SCRIPT} {SAMPLE} '{QUESTION}' {closed}"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0 and "Traceback" not in run.stderr
    assert run.stdout == ("" if ">&- " in f"{closed} " and not closed.startswith("2") else f"{ANSWER}\n")


def test_letters_that_stdout_lacks_are_escaped(tmp_path: Path) -> None:
    bundle = shutil.copytree(packed_bundle(), tmp_path / "ünïcode")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    info = str(Path(SCRIPT).with_name("ppllava-info"))
    run = subprocess.run([info, str(bundle)], capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    command = f"{SCRIPT} {SAMPLE} '{QUESTION}' > /dev/full"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert_one_line_error(run, "No space left on device")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_it_in_order(number: signal.Signals, status: int) -> None:
    process = subprocess.Popen(
        [SCRIPT, SAMPLE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(QUESTION + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == f"{ANSWER}\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status and "Traceback" not in errors
