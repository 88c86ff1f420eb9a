"""Start fork servers and talk to them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from ppllava_edge.bench.fuzz.outcome import Outcome
from ppllava_edge.bench.fuzz.process.child import CPU_SECONDS
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.nano import sample_path

SERVER = "ppllava_edge.bench.fuzz.process.server"
# One thread each: a process with threads must not fork.
SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}


class FuzzServer:
    """A fork server in a process of its own, with a temporary folder. A context manager.

    Args:
        cpu_seconds: What one input may take.

    Attributes:
        answers: Its stdout; readable when an outcome has come.
        input: Where the current input is written.

    Raises:
        PPLLaVAError: If this system can't run one, or it doesn't start.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS):
        if not hasattr(os, "memfd_create"):
            raise PPLLaVAError("fuzzing needs Linux: inputs run in forked processes with limits")
        self.folder = Path(tempfile.mkdtemp(prefix="ppllava-fuzz-"))
        self.input = self.folder / "input"
        shutil.copyfile(sample_path(), self.folder / "video.mp4")
        self._target = ""
        self._process = self._start(cpu_seconds)

    def __enter__(self) -> FuzzServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and remove its folder."""
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def answers(self) -> IO[str]:
        """Its stdout: readable when an outcome has come."""
        assert self._process.stdout is not None
        return self._process.stdout

    def send(self, target: str, suffix: str, data: bytes) -> None:
        """Begin to run an input.

        Args:
            target: The target's name.
            suffix: The suffix of the input's name.
            data: The input.
        """
        assert self._process.stdin is not None
        self._target, self.input = target, self.folder / f"input{suffix}"
        self.input.write_bytes(data)
        self._process.stdin.write(json.dumps({"target": target, "path": str(self.input)}) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Outcome:
        """Wait for the outcome of the input that was sent."""
        line = self.answers.readline()
        if not line:
            raise PPLLaVAError(f"the fork server died ({self._process.wait()}) on {self.input}")
        return Outcome.from_json(json.loads(line))

    def run(self, target: str, suffix: str, data: bytes) -> Outcome:
        """Run an input and wait for its outcome."""
        self.send(target, suffix, data)
        return self.receive()

    def _start(self, cpu_seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", SERVER, str(self.folder), str(cpu_seconds)]
        environment = {**os.environ, **SINGLE_THREADED, "XDG_CACHE_HOME": str(self.folder / "cache")}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        hello = process.stdout.readline()
        if not hello:
            raise PPLLaVAError("the fork server didn't start")
        if json.loads(hello)["threads"] != 1:
            process.kill()
            raise PPLLaVAError("the fork server has several threads; a library starts some on import")
        return process
