"""A long life: thousands of questions, many of them cancelled, abandoned or too late (bench/soak)."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from ppllava_edge.bench.soak.run import soak

MAX_GROWTH = 64 << 20  # bytes of resident memory: the malloc arenas of so many threads fill slowly


@pytest.fixture(autouse=True)
def unlogged(caplog: pytest.LogCaptureFixture) -> None:
    """pytest would keep thousands of records of callbacks that fail, with their tracebacks."""
    caplog.set_level(logging.CRITICAL + 1, "ppllava_edge")


def assert_all_is_well(report: dict[str, Any], max_growth: int = MAX_GROWTH) -> None:
    assert report["wrong"] == []
    assert not any(report["left"].values()), report["left"]
    assert sum(report["ended"].values()) == report["questions"], report["ended"]
    assert report["growth"] < max_growth, report["rss"]
    assert {"stop", "cancelled", "busy"} <= set(report["ended"]) and report["watched"], report["ended"]


@pytest.mark.slow
def test_ten_thousand_questions_by_eight_threads() -> None:
    report = soak(questions=10_000, threads=8, parallel=4, seed=0)
    assert_all_is_well(report)
    assert {"abandoned", "refused", "timeout", "chat"} <= set(report["ended"]), report["ended"]


@pytest.mark.slow
def test_two_thousand_questions_by_asyncio() -> None:
    report = soak(questions=2000, threads=0, parallel=4, seed=1, use_asyncio=True)  # 64 threads answer
    assert_all_is_well(report, 2 * MAX_GROWTH)


@pytest.mark.slow
def test_one_slot_for_all() -> None:
    report = soak(questions=1000, threads=8, parallel=1, seed=2)
    assert report["wrong"] == [] and not any(report["left"].values()), report


@pytest.mark.slow
def test_the_command_says_what_it_found() -> None:
    command = [
        sys.executable,
        "-m",
        "ppllava_edge.bench.soak",
        "--questions",
        "100",
        "--threads",
        "3",
        "--json",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["questions"] == sum(report["ended"].values()) == 100 and report["wrong"] == []


STUCK = """
import asyncio, time
from ppllava_edge.bench.soak import questions, run
from ppllava_edge.bench.soak.__main__ import main
run.STUCK_SECONDS = 1
run._warm_libraries = lambda parallel: None
questions.ThreadQuestions.ask = lambda self, rng: time.sleep(3600)
questions.AsyncQuestions.ask = lambda self, rng: asyncio.sleep(3600)
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--asyncio"]])
def test_a_soak_that_is_stuck_ends(how: list[str]) -> None:
    command = [sys.executable, "-c", STUCK, "--questions", "10", *how]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and "error: no question ended for 1 s, after 0 of them" in run.stderr
