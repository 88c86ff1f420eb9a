"""ppllava-export, run only once for equal checkpoints and options.

python cached_export.py CACHE CHECKPOINT -o BUNDLE [OPTION]…
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path


def main(cache: Path, checkpoint: Path, options: list[str]) -> int:
    """Export into the cache unless it has the bundle, then copy the bundle to the path after -o."""
    place = options.index("-o") + 1
    output, options = Path(options[place]), [*options[: place - 1], *options[place + 1 :]]
    digest = hashlib.sha256(repr(options).encode())
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and "cases" not in p.parent.name):
        digest.update(f"{path.relative_to(checkpoint)}".encode() + path.read_bytes())
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / digest.hexdigest()
    with open(cache / f"{digest.hexdigest()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.is_dir():
            command = [sys.executable, "-m", "ppllava_edge.export.cli", str(checkpoint), "-o", str(kept)]
            status = subprocess.run([*command, *options]).returncode
            if status:
                return status
    shutil.copytree(kept, output)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
