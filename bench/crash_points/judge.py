"""Compare what commands leave: the files below a folder, without what differs from run to run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

TIMED = ("timings", "tokens_per_second", "time_to_first_token")  # differ from run to run


def snapshot(path: Path) -> dict[str, str]:
    """Describe everything below a folder, or a single file.

    Returns:
        Path, relative to the folder → a digest of its contents, "folder" or "link"; nothing if there is no
        such folder. JSON Lines are compared without times, cached features whatever the order of their
        metadata.
    """
    if path.is_file():
        return {"": _digest(path)}
    found = {}
    for entry in sorted(path.rglob("*")):
        kind = "link" if entry.is_symlink() else "folder" if entry.is_dir() else _digest(entry)
        found[entry.relative_to(path).as_posix()] = kind
    return found


def visible(found: dict[str, str]) -> dict[str, str]:
    """The part of a snapshot that readers look at: without staging folders."""
    return {
        path: kind
        for path, kind in found.items()
        if not any(part.startswith(".") and part.endswith(".part") for part in path.split("/"))
    }


def differences(want: dict[str, str], got: dict[str, str]) -> list[str]:
    """The paths that are missing, left over or different, each with which of these it is."""
    wrong = [
        f"{path} {'differs' if path in got else 'is missing'}" for path in want if got.get(path) != want[path]
    ]
    return [*wrong, *(f"{path} is left over" for path in got if path not in want)]


def _digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        data = b"".join(map(_without_times, data.splitlines(keepends=True)))
    elif path.suffix == ".features":
        data = _sorted_header(data)
    return hashlib.sha256(data).hexdigest()


def _without_times(line: bytes) -> bytes:
    """A line of JSON without times; a line that was cut off stays as it is."""
    try:
        value: Any = json.loads(line)
    except ValueError:
        return line
    return json.dumps({key: value[key] for key in value if key not in TIMED}).encode() + line[-1:]


def _sorted_header(data: bytes) -> bytes:
    """A safetensors file with its header's keys in order; a file that was cut off stays as it is."""
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:end])
    except ValueError:
        return data
    return json.dumps(header, sort_keys=True).encode() + data[end:]
