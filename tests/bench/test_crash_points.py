"""Commands that are killed at a write, or refused by the disk, give the same result when they run again."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from ppllava_edge.bench.crash_points.judge import differences, snapshot, visible
from ppllava_edge.bench.crash_points.runs import Point, Runner, compile_shim, kill_points
from ppllava_edge.bench.crash_points.scenarios import SCENARIOS, Scenario
from ppllava_edge.bench.crash_points.table import crash_row, spread

needs_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs Linux and a C compiler"
)
SAMPLES = {"export --calibrate": 2}  # kills of the slow command; of the others 5


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_sample_of_crash_points(scenario: Scenario, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "logs").mkdir()
    sample = SAMPLES.get(scenario.name, 5)
    with Runner(compile_shim(tmp_path), tmp_path / "home", tmp_path / "logs") as runner:
        row = crash_row(scenario, runner, tmp_path, sample, int(sample > 2), lambda line: None)
    assert not row.problems and row.killed >= 2 and row.same == row.tried >= sample


@pytest.mark.slow
@needs_compiler
def test_the_harness_sees_what_a_command_leaves(tmp_path: Path) -> None:
    """A command that writes its target in place leaves a half one, which the table reports."""
    (tmp_path / "home").mkdir()
    (tmp_path / "logs").mkdir()
    careless = "ppllava-export", "nano", "-o", "tmp/unswept", "--precision", "fp32", "--no-engine"
    scenario = Scenario("careless", careless, lambda home, runner: None, "tmp")
    with Runner(compile_shim(tmp_path), tmp_path / "home", tmp_path / "logs") as runner:
        row = crash_row(scenario, runner, tmp_path, 3, 0, lambda line: None)
    assert row.killed == 3 and row.same == 2  # the last kill comes after the rename: the next run refuses
    assert any("exists already" in problem for problem in row.problems)


def test_consecutive_writes_are_merged() -> None:
    points = [
        Point(number, call, path)
        for number, (call, path) in enumerate(
            [
                *[
                    ("create", "a"),
                    ("write", "a"),
                    ("write", "a"),
                    ("close", "a"),
                    ("write", "a"),
                    ("fsync", "a"),
                ],
                *[("write", "b"), ("write", "a"), ("rename", "c")],
            ],
            1,
        )
    ]
    assert [(point.number, mode) for point, mode in kill_points(points)] == [
        *[(1, "kill"), (2, "kill"), (5, "tear"), (6, "kill")],
        *[(7, "kill"), (7, "tear"), (8, "kill"), (8, "tear"), (9, "kill")],
    ]
    assert spread(range(10), 4) == [0, 3, 6, 9] and spread(range(3), None) == [0, 1, 2] == spread(range(3), 7)


def test_results_are_compared_without_times(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"video": "a", "timings": {"vision": 1}}\n{"half')
    first = snapshot(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"video": "a", "timings": {"vision": 2}}\n{"half')
    assert differences(first, snapshot(tmp_path)) == []
    (tmp_path / "a.jsonl").write_text('{"video": "b", "timings": {"vision": 1}}\n{"half')
    (tmp_path / ".x.part").mkdir()
    assert differences(first, snapshot(tmp_path)) == ["a.jsonl differs", ".x.part is left over"]
    assert ".x.part" not in visible(snapshot(tmp_path)) and snapshot(tmp_path / "nothing") == {}
