"""What a decoding process gives up before it opens a file: memory, processor time, files, privileges."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

from ppllava_edge.runtime.media.limits import MediaLimits

MAX_OPEN_FILES = 64
CPU_GRACE = 10  # seconds of processor time beside twice decode_seconds on every core
MAX_CPU_SECONDS = 2**31  # more than setrlimit takes everywhere is no limit
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # Linux's prctl


def confine(limits: MediaLimits, parent: int) -> None:
    """Confine this process, for good.

    It may use `limits.memory` bytes of address space, few open files, and as much processor time as
    decode_seconds of all cores allow to open a source and to read it. It can't write to files, dump its
    memory, or gain privileges by starting a program. On Linux it is killed when its parent dies, and first
    of all processes when the machine runs out of memory.

    Args:
        limits: memory and decode_seconds hold.
        parent: The parent's process id.
    """
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != parent:  # it died before
        os._exit(1)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    if limits.decode_seconds is not None:
        seconds = int(min(2 * limits.decode_seconds * (os.cpu_count() or 1), MAX_CPU_SECONDS)) + CPU_GRACE
        _limit(resource.RLIMIT_CPU, seconds, seconds + CPU_GRACE)  # SIGXCPU comes first, then SIGKILL
    _limit(resource.RLIMIT_AS, limits.memory)


def address_space() -> int:
    """Bytes of this process's address space; 0 where that is unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 0


def _limit(kind: int, soft: int, hard: int | None = None) -> None:
    """Set a limit that can't be raised again; a lower one stays."""
    hard = soft if hard is None else hard
    with contextlib.suppress(ValueError, OSError):  # a system without this limit
        present = resource.getrlimit(kind)[1]
        if present != resource.RLIM_INFINITY:
            soft, hard = min(soft, present), min(hard, present)
        resource.setrlimit(kind, (soft, hard))
