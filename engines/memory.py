"""Peak memory of this process."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_memory() -> int:
    """Largest resident size so far, bytes.

    From /proc where there is one: getrusage's figure starts at what the parent process had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
