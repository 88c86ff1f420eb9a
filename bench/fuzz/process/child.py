"""The child that handles one input: limits, the target, and a report of how it went."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from ppllava_edge.bench.fuzz.outcome import message_feature, message_problem
from ppllava_edge.bench.fuzz.process.coverage import ROOTS, LineCoverage
from ppllava_edge.bench.fuzz.targets.registry import RUNNABLE
from ppllava_edge.bench.fuzz.targets.target import Unexpected
from ppllava_edge.engines.errors import PPLLaVAError

ADDRESS_SPACE = 3 << 29  # bytes that a child may map beyond the server's own; 1.5 GiB
RESIDENT = 512 << 20  # bytes of memory that a child may use: the limits of the targets promise less
FILE_SIZE = 64 << 20  # bytes of any file that a child writes
CPU_SECONDS = 10.0  # of all threads together
WALL_SECONDS = 60.0


class Streams:
    """The files that take a child's stdout, stderr and report; in memory, shared with the server."""

    def __init__(self) -> None:
        self.out, self.err, self.report = (os.memfd_create(name) for name in ("out", "err", "report"))

    def clear(self) -> None:
        """Empty all of them."""
        for descriptor in (self.out, self.err, self.report):
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)

    def read(self, descriptor: int, limit: int = 1 << 20) -> bytes:
        """What was written to one of them, up to `limit` bytes."""
        return os.pread(descriptor, limit, 0)


def run_child(target: str, path: Path, scratch: Path, streams: Streams, cpu_seconds: float) -> NoReturn:
    """Run a target in this process, write a report, and exit. Called right after fork.

    Args:
        target: The target's name.
        path: The input.
        scratch: An empty folder for the target's own files; becomes the working directory.
        streams: Where the report, stdout and stderr go.
        cpu_seconds: Of all threads together, after which the process ends.
    """
    status = 1
    try:
        _prepare(scratch, streams, cpu_seconds)
        coverage = LineCoverage()
        report = _run(target, path, scratch, coverage)
        report["features"] = coverage.features()
        sys.stdout.flush()
        os.write(streams.report, json.dumps(report).encode())
        status = 0
    except BaseException:
        os.write(streams.err, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _prepare(scratch: Path, streams: Streams, cpu_seconds: float) -> None:
    os.setsid()
    os.chdir(scratch)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, descriptor in ((null, 0), (streams.out, 1), (streams.err, 2)):
        os.dup2(source, descriptor)
    faulthandler.enable(file=streams.err)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
        faulthandler.register(number, file=streams.err, all_threads=False, chain=True)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_AS, mapped + ADDRESS_SPACE),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, int(cpu_seconds) + 5),
    ):
        resource.setrlimit(limit, (value, value))


def _run(target: str, path: Path, scratch: Path, coverage: LineCoverage) -> dict[str, Any]:
    """Run a target. Returns the outcome's kind, place and detail."""
    try:
        coverage.start()
        RUNNABLE[target].run(path, scratch)
    except PPLLaVAError as error:
        coverage.stop()
        problem = message_problem(str(error), (str(path), str(scratch)))
        if problem:
            return _failure("message", f"{problem}-{_place(error.__traceback__)}", error)
        return {"kind": "refused", "place": str(message_feature(str(error))), "detail": str(error)}
    except MemoryError as error:
        coverage.stop()
        return _failure("memory", _place(error.__traceback__), error)
    except Unexpected as error:
        coverage.stop()
        return _failure("unexpected", str(error).split(":")[0], error)
    except BaseException as error:  # PanicException of tokenizers is a BaseException, too
        coverage.stop()
        return _failure("exception", f"{type(error).__name__}-{_place(error.__traceback__)}", error)
    coverage.stop()
    return {"kind": "ok", "place": "", "detail": ""}


def _failure(kind: str, place: str, error: BaseException) -> dict[str, Any]:
    lines = traceback.format_exception(type(error), error, error.__traceback__, limit=-12)
    return {"kind": kind, "place": place, "detail": "".join(lines)[-4000:]}


def _place(trace: TracebackType | None) -> str:
    """The innermost function of the package in a traceback: file and function."""
    place = "outside"
    for frame, _ in traceback.walk_tb(trace):
        code = frame.f_code
        if code.co_filename.startswith(ROOTS):
            place = f"{Path(code.co_filename).stem}.{code.co_name}"
    return place
