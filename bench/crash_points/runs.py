"""Run commands under the shim: trace them, kill them at a call, let calls fail, or delay them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ppllava_edge.engines.errors import PPLLaVAError

SHIM = Path(__file__).with_name("shim.c")
LIMIT = 300.0  # seconds of one command


@dataclass(frozen=True)
class Finished:
    """A command that ended.

    Attributes:
        status: Its exit status; negative: killed by this signal.
        late: Whether it was killed because it ran longer than LIMIT.
        stdout, stderr: What it printed.
    """

    status: int
    late: bool
    stdout: str
    stderr: str

    @property
    def is_one_line_error(self) -> bool:
        """Whether it ended with exit status 2 and one line of error; notes may precede it."""
        errors = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        return self.status == 2 and len(errors) == 1 and "Traceback" not in self.stderr


@dataclass(frozen=True)
class Point:
    """A call that changes files.

    Attributes:
        number: Its number in the run, from 1.
        call: create, write, truncate, fsync, close, rename, link, unlink, rmdir or mkdir.
        path: The file, or the new name.
    """

    number: int
    call: str
    path: str


def compile_shim(folder: Path) -> Path:
    """Compile shim.c with the system's C compiler. Returns the library.

    Raises:
        PPLLaVAError: If there is no compiler, or this isn't Linux.
    """
    if not sys.platform.startswith("linux"):
        raise PPLLaVAError("crash points are counted by a preloaded library, which needs Linux")
    library = folder / "shim.so"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", "-o", str(library), str(SHIM), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise PPLLaVAError(f"there is no C compiler {command[0]}; name one with CC=") from None
    except subprocess.CalledProcessError as error:
        raise PPLLaVAError(f"{SHIM.name} doesn't compile: {error.stderr.strip()}") from None
    return library


class Runner:
    """Runs commands in a home folder of their own, under the shim. A context manager.

    Args:
        library: The compiled shim.
        home: The commands' home and current folder; the calls below it are counted.
        logs: A folder for their output, outside of home.
    """

    def __init__(self, library: Path, home: Path, logs: Path):
        self.home, self.logs = home, logs
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ppllava_edge.bench.crash_points.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._receive()

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pipe(self._process.stdin).close()
        self._process.wait()
        self._pipe(self._process.stdout).close()

    def run(
        self,
        command: Sequence[str],
        mode: str = "off",
        number: int = 0,
        error: int = 0,
        trace: Path | None = None,
    ) -> Finished:
        """Run a command.

        Args:
            command: One of worker.PROGRAMS, and its arguments.
            mode: off, trace, kill (before the call), tear (in the middle of a write), fail or slow.
            number: The call's number; for slow, every how many calls wait.
            error: The error number of calls that fail.
            trace: The file for the trace.
        """
        stdout, stderr = self.logs / "stdout", self.logs / "stderr"
        job = {
            "program": command[0],
            "arguments": list(command[1:]),
            "home": str(self.home),
            "stdout": str(stdout),
            "stderr": str(stderr),
            "mode": mode,
            "number": number,
            "error": error,
            "trace": str(trace or ""),
            "seconds": LIMIT,
        }
        self._pipe(self._process.stdin).write(json.dumps(job) + "\n")
        self._pipe(self._process.stdin).flush()
        ended = json.loads(self._receive())
        texts = [path.read_text(errors="replace") for path in (stdout, stderr)]
        return Finished(ended["status"], ended["late"], *texts)

    def trace(self, command: Sequence[str]) -> tuple[Finished, list[Point]]:
        """Run a command to its end. Returns it and all calls below home."""
        path = self.logs / "trace"
        finished = self.run(command, "trace", trace=path)
        lines = path.read_text(errors="replace").splitlines()
        calls = [line.split("\t", 3) for line in lines]
        return finished, [Point(int(number), call, name) for number, call, _, name in calls]

    def _receive(self) -> str:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise PPLLaVAError("the process that runs the commands ended; its error is above")
        return line

    @staticmethod
    def _pipe(pipe: IO[Any] | None) -> IO[Any]:
        assert pipe is not None
        return pipe


def kill_points(points: Sequence[Point]) -> list[tuple[Point, str]]:
    """Choose where to kill: before each call, but of consecutive writes to one file only the first and last.

    The last of such writes is torn: one half of it is written.

    Returns:
        Calls and the mode for each, kill or tear.
    """
    chosen: list[tuple[Point, str]] = []
    points = [point for point in points if point.call != "close"]
    for i, point in enumerate(points):
        if point.call != "write":
            chosen.append((point, "kill"))
            continue
        same = [
            0 <= k < len(points) and (points[k].call, points[k].path) == (point.call, point.path)
            for k in (i - 1, i + 1)
        ]
        if not same[0]:
            chosen.append((point, "kill"))
        if not same[1]:
            chosen.append((point, "tear"))
    return chosen


def as_row(value: Any) -> dict[str, Any]:
    """A dataclass as a dict for JSON."""
    return asdict(value)
