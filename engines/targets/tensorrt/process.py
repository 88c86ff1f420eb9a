"""Run the TensorRT worker: one process per engine, so that its memory goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.targets.tensorrt.worker import Job
from ppllava_edge.engines.terminal import human_bytes

ADDR_NO_RANDOMIZE = 0x0040000  # Linux's personality(2)
KILLED = (-9, 137)  # exit statuses of a process that the system killed for lack of memory


@dataclass
class Built:
    """An engine file, and the time and memory of its build.

    Attributes:
        name: The engine's name.
        bytes: Size of the file in bytes.
        seconds: Duration of the build.
        peak: Peak resident memory in bytes.
        predicted: Expected peak in bytes.
        largest: Size of the largest weight in bytes.
        kept: Whether it comes from an earlier, interrupted build.
    """

    name: str
    bytes: int
    seconds: float
    peak: int
    predicted: int
    largest: int
    kept: bool = False


def run_job(job: Job, staging: Path, name: str, key: str, predicted: int, largest: int) -> Built:
    """Build an engine in a process of its own, unless an earlier build left it in the staging folder.

    Args:
        job: Paths in it are relative to the staging folder.
        staging: The folder to write the engine into.
        name: The engine's name.
        key: A hash of everything that the engine depends on.
        predicted: Expected peak of resident memory, bytes.
        largest: Bytes of the largest weight.

    Raises:
        EngineError: If the build failed.
    """
    done = staging / f"{name}.done"
    earlier = _earlier_result(done, staging / job.engine, key)
    if earlier is not None:
        return _built(name, earlier, predicted, largest, kept=True)
    log = staging / "build.log"
    run = _run_worker(job, staging, name, log)
    try:
        result = json.loads(run.stdout.decode().strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise EngineError(
            f"building {name} {_failure(run.returncode, predicted)}: try a smaller --piece, or see {log}"
        ) from None
    if "error" in result:
        raise EngineError(f"{result['error']} (messages: {log})")
    done.write_text(json.dumps({**result, "key": key}), encoding="utf-8")
    return _built(name, result, predicted, largest)


def _earlier_result(done: Path, engine: Path, key: str) -> dict[str, Any] | None:
    """The report of an earlier build of this engine, if its file is still intact."""
    if not done.is_file() or not engine.is_file():
        return None
    result: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    same = result.get("key") == key and result["bytes"] == engine.stat().st_size
    return result if same else None


def _built(name: str, result: dict[str, Any], predicted: int, largest: int, kept: bool = False) -> Built:
    return Built(name, result["bytes"], result["seconds"], result["peak_bytes"], predicted, largest, kept)


def _run_worker(job: Job, staging: Path, name: str, log: Path) -> subprocess.CompletedProcess[bytes]:
    job.save(staging / "job.json")
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    if job.plugin != "none" and job.library == "tensorrt_rtx":
        folder = _with_unversioned_library(staging)
        environment["LD_LIBRARY_PATH"] = f"{folder}:{environment.get('LD_LIBRARY_PATH', '')}"
    with open(log, "ab") as messages:
        messages.write(f"== {name}\n".encode())
        messages.flush()
        return subprocess.run(
            [sys.executable, "-m", f"{__package__}.worker", "job.json"],
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
            cwd=staging,
            preexec_fn=_fix_addresses,
        )


def _failure(status: int, predicted: int) -> str:
    if status in KILLED:
        return f"ran out of memory (it was killed); it was expected to need {human_bytes(predicted)}"
    return f"ended with status {status}"


def _fix_addresses() -> None:
    """Turn off address randomisation in the worker.

    The library orders some things by address, and a repeated build should give the same bytes.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)


def _with_unversioned_library(folder: Path) -> Path:
    """Link TensorRT-RTX into a folder under the unversioned name that its plugin loader looks for.

    Without it the library aborts the process.
    """
    spec = util.find_spec("tensorrt_rtx_libs")
    if spec is not None and spec.origin:
        for library in Path(spec.origin).parent.glob("libtensorrt_rtx.so.*"):
            (folder / "libtensorrt_rtx.so").unlink(missing_ok=True)
            (folder / "libtensorrt_rtx.so").symlink_to(library)
            break
    return folder
