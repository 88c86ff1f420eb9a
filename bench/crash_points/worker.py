"""A process with the preloaded shim that runs commands in forked children, which start within milliseconds.

It reads jobs as JSON lines and answers each with a JSON line; see Runner in runs.py.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

PROGRAMS = {  # command → module with its main()
    "ppllava-export": "ppllava_edge.export.cli",
    "ppllava-build": "ppllava_edge.engines.cli.build",
    "ppllava-info": "ppllava_edge.engines.cli.info",
    "ppllava-run": "ppllava_edge.runtime.cli.main",
}
PRELOADED = (  # what the commands load on first use
    "ppllava_edge.export.convert",
    "ppllava_edge.calibration.calibrate",
    "ppllava_edge.engines.targets.onnxruntime_cpu",
    "ppllava_edge.runtime.batch",
    "ppllava_edge.runtime.video_qa",
    "onnxruntime",
    "safetensors.numpy",
    "tokenizers",
    "av",
)
MODES = ("off", "trace", "kill", "tear", "fail", "slow")  # as in shim.c


def run(job: dict[str, Any]) -> int:
    """Run a job's command in this process. Returns its exit status."""
    home = Path(job["home"])
    os.setsid()  # the shim kills the process group
    os.chdir(home)
    scratch = home / "tmp"
    os.environ |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "TMPDIR": str(scratch)}
    tempfile.tempdir = None
    for descriptor, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    trace = os.open(job["trace"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if job["trace"] else -1
    main = importlib.import_module(PROGRAMS[job["program"]]).main
    sys.argv = [job["program"], *job["arguments"]]
    shim = ctypes.CDLL(None).crash_start
    shim(MODES.index(job["mode"]), ctypes.c_long(job["number"]), job["error"], os.fsencode(home), trace)
    try:
        main(args=job["arguments"], prog_name=job["program"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        status = 0
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = 1
    return status


def fork(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a child. Returns its exit status, negative for a signal, and whether it ran too long."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = run(job)
        finally:
            os._exit(status)
    deadline, late = time.monotonic() + job["seconds"], False
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return {"status": os.waitstatus_to_exitcode(status), "late": late}
        if time.monotonic() > deadline and not late:
            late = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.002)


def main() -> None:
    """Serve jobs until stdin ends."""
    for module in (*PROGRAMS.values(), *PRELOADED):
        importlib.import_module(module)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
