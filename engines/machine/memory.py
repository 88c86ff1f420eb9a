"""Memory of this process, and of the machine."""

from __future__ import annotations

import re
import resource
from pathlib import Path


def peak_memory() -> int:
    """Largest resident size so far, bytes.

    From /proc where there is one: getrusage's figure starts at what the parent process had.
    """
    return _of_this_process("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory() -> int:
    """Bytes resident now; 0 where the system doesn't say."""
    return _of_this_process("VmRSS")


def _of_this_process(name: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def system_memory(root: Path = Path("/")) -> dict[str, int]:
    """What the kernel says of this machine's memory, by its names (MemTotal, MemAvailable, …), bytes; {} where it doesn't. root: in tests."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}


def available_memory() -> int | None:
    """Bytes that this machine could give, None where nobody says."""
    return system_memory().get("MemAvailable")
