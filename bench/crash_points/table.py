"""Kill a command at every call that changes files, run it again, and judge what a user would find."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ppllava_edge.bench.crash_points.judge import differences, snapshot, visible
from ppllava_edge.bench.crash_points.runs import Finished, Point, Runner, kill_points
from ppllava_edge.bench.crash_points.scenarios import Scenario
from ppllava_edge.engines.errors import PPLLaVAError

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # full disk, quota, read-only, broken disk
KILLED = -9


@dataclass
class Row:
    """What was seen of one command.

    Attributes:
        name: The scenario's name.
        points: Calls that change files in one undisturbed run.
        tried: Runs that were disturbed: killed, or refused by the disk.
        killed: How many of them were killed.
        same: After how many the next run gave the result of an undisturbed one, and left nothing over.
        states: What the target was after the kill → how often: old, new, other (absent counts as old where
            there was nothing before).
        problems: One line per finding.
    """

    name: str
    points: int = 0
    tried: int = 0
    killed: int = 0
    same: int = 0
    states: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Trial:
    """One scenario: its start state, its undisturbed result, and its disturbed runs.

    Args:
        scenario: The command.
        runner: Runs commands in runner.home.
        scratch: A folder for the start state.

    Raises:
        PPLLaVAError: If the undisturbed command fails, or two undisturbed runs differ.
    """

    def __init__(self, scenario: Scenario, runner: Runner, scratch: Path):
        self.scenario, self.runner = scenario, runner
        self.start = scratch / "start"
        shutil.rmtree(runner.home, ignore_errors=True)
        shutil.rmtree(self.start, ignore_errors=True)
        (runner.home / "tmp").mkdir(parents=True)
        scenario.prepare(runner.home, runner)
        shutil.copytree(runner.home, self.start, symlinks=True)
        self._seen: dict[str, str] = {}
        self.answers: set[str] = set()
        self.old = self._state()
        self._read(self.old)
        self.finished = self._undisturbed()
        self.result = snapshot(runner.home)
        self.new = self._state()
        self._read(self.new)
        self._reset()
        _, self.points = runner.trace(scenario.command)
        wrong = differences(self.result, snapshot(runner.home))
        if wrong:
            raise PPLLaVAError(f"two undisturbed runs of {scenario.name} differ: {'; '.join(wrong)}")

    def kill_all(self, row: Row, chosen: Sequence[tuple[Point, str]], show: Callable[[str], None]) -> None:
        """Kill at each of these calls and run again."""
        for point, mode in chosen:
            what = f"{mode} at {point.number} {point.call} {self._shorter(point.path)}"
            show(what)
            self._reset()
            run = self.runner.run(self.scenario.command, mode, point.number)
            row.killed += run.status == KILLED
            if run.late:
                row.problems.append(f"{what}: it hung")
            elif run.status not in (KILLED, self.scenario.status):
                row.problems.append(f"{what}: exit status {run.status}: {_end(run)}")
            self._judge(row, what)

    def fail_all(self, row: Row, points: Sequence[Point], show: Callable[[str], None]) -> None:
        """Let all calls fail from each of these on, with each error, and run again."""
        for error in ERRORS:
            for point in points:
                what = (
                    f"{errno.errorcode[error]} from {point.number} {point.call} {self._shorter(point.path)}"
                )
                show(what)
                self._reset()
                run = self.runner.run(self.scenario.command, "fail", point.number, error)
                if not (
                    run.is_one_line_error or run.status in (self.scenario.status, self.scenario.on_full_disk)
                ):
                    row.problems.append(f"{what}: exit status {run.status}: {_end(run)}")
                is_success = run.status == self.scenario.status != self.scenario.on_full_disk
                if is_success and self._state() != self.new:
                    row.problems.append(f"{what}: exit status {run.status}, but the result is another one")
                if "Traceback" in run.stderr or run.late:
                    row.problems.append(f"{what}: {'it hung' if run.late else _end(run)}")
                self._judge(row, what)

    def slow(self, row: Row, show: Callable[[str], None]) -> None:
        """Delay every call."""
        show("slow disk")
        self._reset()
        self.runner.run(self.scenario.command, "slow", 1)
        self._judge(row, "slow disk")

    def _judge(self, row: Row, what: str) -> None:
        """Look at what a disturbed run left, as a reader would; then run again, and compare."""
        row.tried += 1
        state = self._state()
        name = "old" if state == self.old else "new" if state == self.new else "other"
        row.states[name] = row.states.get(name, 0) + 1
        problem = self._read(state)
        if problem:
            row.problems.append(f"{what}: {problem}")
        again = self.runner.run(self.scenario.command)
        wrong = differences(self.result, snapshot(self.runner.home))
        is_done = name == "new" and self.scenario.done and again.is_one_line_error
        if is_done and self.scenario.done in again.stderr:
            pass
        elif again.status != self.finished.status:
            wrong.insert(0, f"exit status {again.status}: {_end(again)}")
        elif self.scenario.prints and again.stdout != self.finished.stdout:
            wrong.insert(0, f"it printed {again.stdout!r}")
        if wrong:
            row.problems.append(f"{what}, run again: {'; '.join(wrong[:4])}")
        else:
            row.same += 1

    def _undisturbed(self) -> Finished:
        finished = self.runner.run(self.scenario.command)
        if finished.status != self.scenario.status:
            raise PPLLaVAError(f"{self.scenario.name} fails undisturbed: {_end(finished)}")
        return finished

    def _read(self, state: dict[str, str]) -> str:
        """Read a state of the target once. Returns what a reader must not see, or ""."""
        key = repr(sorted(state.items()))
        if key not in self._seen:
            self._seen[key] = self._readers_problem(
                is_whole=state in (self.old, getattr(self, "new", self._state()))
            )
        return self._seen[key]

    def _readers_problem(self, is_whole: bool) -> str:
        for reader in self.scenario.readers:
            run = self.runner.run(reader)
            if is_whole and run.status == 0:
                self.answers.add(run.stdout)
            is_right = run.status == 0 and (run.stdout in self.answers or reader[0] == "ppllava-info")
            if not (is_right or run.is_one_line_error):
                return f"{reader[0]} ended with {run.status}, {run.stdout!r}, {_end(run)}"
        return ""

    def _state(self) -> dict[str, str]:
        return visible(snapshot(self.runner.home / self.scenario.target))

    def _reset(self) -> None:
        shutil.rmtree(self.runner.home)
        shutil.copytree(self.start, self.runner.home, symlinks=True)

    def _shorter(self, path: str) -> str:
        return path.removeprefix(f"{self.runner.home}/")


def crash_row(
    scenario: Scenario,
    runner: Runner,
    scratch: Path,
    sample: int | None,
    faults: int,
    show: Callable[[str], None],
) -> Row:
    """Disturb one command in every way.

    Args:
        scenario: The command.
        runner: Runs it.
        scratch: A folder for its start state.
        sample: At most so many kills, spread evenly; None: all.
        faults: At most so many calls for each of the disk's errors.
        show: Called with a line before each disturbed run.
    """
    trial = Trial(scenario, runner, scratch)
    row = Row(scenario.name, len(trial.points))
    trial.kill_all(row, spread(kill_points(trial.points), sample), show)
    trial.fail_all(row, spread(trial.points, faults), show)
    trial.slow(row, show)
    return row


def spread(items: Sequence, count: int | None) -> list:
    """At most `count` items, evenly spaced, the first and the last among them; None: all."""
    if count is None or count >= len(items):
        return list(items)
    if count < 2:
        return list(items[:count])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _end(run: Finished) -> str:
    """The last line on stderr."""
    return (run.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
