"""Memory of this process and of the machine."""

from __future__ import annotations

import re
import resource
from pathlib import Path


def peak_memory() -> int:
    """The largest resident size of this process so far, bytes.

    From /proc where it exists: getrusage starts at the size of the parent process.
    """
    return _process_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory() -> int:
    """The resident size of this process, bytes; 0 where the system doesn't report it."""
    return _process_status("VmRSS")


def system_memory(root: Path = Path("/")) -> dict[str, int]:
    """The machine's memory as /proc/meminfo lists it.

    Args:
        root: Root of the file system (for tests).

    Returns:
        Bytes by the kernel's names (MemTotal, MemAvailable, …); {} without /proc/meminfo.
    """
    try:
        text = (root / "proc/meminfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}


def available_memory() -> int | None:
    """Memory that can be allocated without swapping, bytes; None where the system doesn't report it."""
    return system_memory().get("MemAvailable")


def _process_status(name: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
