"""The fork server: a process with one thread that forks a child for every input.

Started as `python -m ppllava_edge.bench.fuzz.process.server FOLDER [CPU_SECONDS]`. Reads requests from stdin,
one line of JSON each ({"target", "path"}), and answers each with a line of JSON on stdout: an Outcome.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from ppllava_edge.bench.fuzz.outcome import Outcome, message_feature
from ppllava_edge.bench.fuzz.process.canaries import Canaries
from ppllava_edge.bench.fuzz.process.child import CPU_SECONDS, RESIDENT, Streams, run_child
from ppllava_edge.bench.fuzz.process.coverage import ROOTS
from ppllava_edge.bench.fuzz.targets.registry import preload

PARENT_DIED = 1  # PR_SET_PDEATHSIG
TIMERS = {signal.SIGALRM, signal.SIGPROF, signal.SIGXCPU}
CANARY = "video.mp4"  # a video in the server's folder; its copy must never be opened
LOG_LINES = 40  # of stderr that count as features


class Server:
    """Forks a child for every input and says what became of it.

    Args:
        folder: Where inputs lie and children work.
        cpu_seconds: What one input may take.
    """

    def __init__(self, folder: Path, cpu_seconds: float = CPU_SECONDS):
        self.folder, self.cpu_seconds = folder, cpu_seconds
        self.streams = Streams()
        self.canaries = Canaries(folder / "canaries", {CANARY: (folder / CANARY).read_bytes()})
        self._reported: set[int] = set()
        self._own_memory = 0

    def run(self, target: str, path: Path) -> Outcome:
        """Run a target on an input."""
        scratch = self.folder / "scratch"
        scratch.mkdir()
        self.streams.clear()
        started = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            run_child(target, path, scratch, self.streams, self.cpu_seconds)
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what the child has started itself
        shutil.rmtree(scratch, ignore_errors=True)
        memory = max(usage.ru_maxrss * 1024 - self._own_memory, 0)
        outcome = self._outcome(target, status, memory)
        outcome.seconds, outcome.memory = seconds, memory
        return outcome

    def freeze(self) -> None:
        """Call when everything is imported: children then share this process's memory."""
        gc.collect()
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        self._own_memory = os.wait4(pid, 0)[2].ru_maxrss * 1024

    def _outcome(self, target: str, status: int, memory: int) -> Outcome:
        log = self.streams.read(self.streams.err).decode(errors="replace")
        touched = self.canaries.touched()
        if os.WIFSIGNALED(status):
            number = signal.Signals(os.WTERMSIG(status))
            if number in TIMERS:
                return Outcome(target, "timeout", _python_place(log), log[-2000:])
            return Outcome(target, "signal", f"{number.name}-{_python_place(log)}", log[-2000:])
        report = self.streams.read(self.streams.report)
        if not report:
            return Outcome(target, "exit", str(os.WEXITSTATUS(status)), log[-2000:])
        outcome = Outcome(target=target, **json.loads(report))
        outcome.features = self._new(outcome.features + [message_feature(x) for x in _log_lines(log)])
        if not outcome.is_finding:
            printed = self.streams.read(self.streams.out)
            if touched:
                outcome.kind, outcome.place = touched, ""
            elif printed:
                outcome.kind, outcome.place, outcome.detail = "stdout", "", printed[:2000].decode("latin-1")
            elif memory > RESIDENT:
                outcome.kind, outcome.place = "memory", "resident"
                outcome.detail = f"{memory >> 20} MiB; {outcome.detail}"
        return outcome

    def _new(self, features: list[int]) -> list[int]:
        """The features that no earlier input had."""
        new = sorted(set(features) - self._reported)
        self._reported.update(new)
        return new


def _log_lines(log: str) -> list[str]:
    """Lines that FFmpeg logged, without the addresses of its contexts."""
    lines = re.sub(r"\[[^\]]*@ 0x[0-9a-f]+\]", "", log).splitlines()
    return sorted(set(lines))[:LOG_LINES]


def _python_place(log: str) -> str:
    """The innermost function of the package in a traceback of faulthandler."""
    for file, function in re.findall(r'File "([^"]+)", line \d+ in (\w+)', log):
        if file.startswith(ROOTS):
            return f"{Path(file).stem}.{function}"
    return "outside"


def main() -> None:
    """Serve requests until stdin ends."""
    ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder = Path(sys.argv[1])
    preload(folder)
    server = Server(folder, *map(float, sys.argv[2:]))
    server.freeze()
    print(json.dumps({"threads": len(os.listdir("/proc/self/task"))}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        outcome = server.run(request["target"], Path(request["path"]))
        print(json.dumps(vars(outcome)), file=answers, flush=True)


if __name__ == "__main__":
    main()
