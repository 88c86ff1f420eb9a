"""integrity."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppllava_edge.engines.bundle.manifest import MANIFEST, FileEntry, Manifest
from ppllava_edge.engines.errors import BundleError

ALWAYS_HASHED = 256 << 20  # bytes in all up to which hashes are checked on every open


def damaged_file(folder: Path, files: dict[str, FileEntry], verify: bool = False) -> str | None:
    """The first file whose hash is wrong, or None. Large folders are hashed once and then remembered by a stamp, unless verify is set."""
    stamp = None if sum(f.bytes for f in files.values()) <= ALWAYS_HASHED else _stamp(folder, files)
    if stamp and not verify and _stamp_known(stamp):
        return None
    for name, entry in files.items():
        if hash_file(folder / name) != entry.sha256:
            return name
    if stamp:
        _remember_stamp(stamp)
    return None


def _stamp(folder: Path, files: dict[str, FileEntry]) -> str:
    parts = [str(folder.resolve())]
    for name, entry in sorted(files.items()):
        s = (folder / name).stat()
        parts.append(f"{name} {entry.sha256} {s.st_size} {s.st_mtime_ns} {s.st_ino}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal. Raises BundleError if it can't be read."""
    try:
        with open(path, "rb") as file:
            return (
                hashlib.file_digest(file, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else _hash_blocks(file)
            )
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror}") from None


def _hash_blocks(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where this user's caches live: $XDG_CACHE_HOME/ppllava-edge or ~/.cache/ppllava-edge."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppllava-edge"


def _stamp_known(stamp: str) -> bool:
    return (cache_folder() / "verified" / stamp).exists()


def _remember_stamp(stamp: str) -> None:
    try:
        folder = cache_folder() / "verified"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / stamp).touch()
    except OSError:
        return  # a read-only home costs a hash on the next open, nothing else


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in folder, complete the manifest with them and write it."""
    paths = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    manifest = replace(
        manifest, files={path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in paths}
    )
    (folder / MANIFEST).write_text(json.dumps(manifest.as_json(), indent=1) + "\n", encoding="utf-8")
    return manifest
