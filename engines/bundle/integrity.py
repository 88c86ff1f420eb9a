"""Hashes of the files of bundles and engines: computed, checked, and remembered once checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppllava_edge.engines.bundle.manifest import MANIFEST, FileEntry, Manifest
from ppllava_edge.engines.bundle.untrusted import open_inside
from ppllava_edge.engines.errors import BundleError, PPLLaVAError

ALWAYS_HASHED = 256 << 20  # bytes; folders up to this total size are hashed on every open


def damaged_file(folder: Path, files: dict[str, FileEntry], verify: bool = False) -> str | None:
    """Find a file whose hash is wrong. Large folders are hashed once, then remembered by a stamp.

    Args:
        folder: The files' folder.
        files: Their expected sizes and hashes, by name.
        verify: Hash a large folder even if a stamp remembers it.

    Returns:
        The name of the first damaged file, or None.

    Raises:
        BundleError: A file can't be read, or is gone: another command replaced the folder meanwhile.
    """
    try:
        stamp = _stamp(folder, files) if _are_large(files) else None
        if stamp and not verify and _stamp_known(stamp):
            return None
        for name, entry in files.items():
            with open_inside(folder, folder / name) as file:
                if _sha256(folder / name, file) != entry.sha256:
                    return name
    except FileNotFoundError as error:
        raise BundleError(f"{error.filename} is gone; was it replaced meanwhile? Open it again") from None
    if stamp:
        _remember_stamp(stamp)
    return None


def remember_hashes(folder: Path, files: dict[str, FileEntry]) -> None:
    """Leave a stamp for large files whose hashes were computed as they were written.

    Args:
        folder: The files' folder.
        files: Their sizes and hashes, by name.
    """
    if _are_large(files):
        with contextlib.suppress(FileNotFoundError):  # another command replaced the folder already
            _remember_stamp(_stamp(folder, files))


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        BundleError: The file can't be read.
    """
    try:
        with open(path, "rb") as file:
            return _sha256(path, file)
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror}") from None


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json with the sizes and hashes of all files in the folder.

    Returns:
        The manifest with its files filled in.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    files = {path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in paths}
    manifest = replace(manifest, files=files)
    (folder / MANIFEST).write_text(json.dumps(manifest.as_json(), indent=1) + "\n", encoding="utf-8")
    return manifest


def cache_folder() -> Path:
    """This user's cache: $XDG_CACHE_HOME/ppllava-edge or ~/.cache/ppllava-edge.

    Raises:
        PPLLaVAError: The user has no home folder, as in some containers.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppllava-edge"
    except RuntimeError:
        raise PPLLaVAError("this user has no home folder for the cache; set XDG_CACHE_HOME") from None


def _sha256(path: Path, file: Any) -> str:
    """The SHA-256 of an opened file, in hexadecimal. Raises BundleError if it can't be read."""
    try:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        return _hash_blocks(file)
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror}") from None


def _hash_blocks(file: Any) -> str:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _are_large(files: dict[str, FileEntry]) -> bool:
    return sum(entry.bytes for entry in files.values()) > ALWAYS_HASHED


def _stamp(folder: Path, files: dict[str, FileEntry]) -> str:
    """A digest of the files' names, expected hashes, sizes, times and inodes."""
    lines = [str(folder.resolve())]
    for name, entry in sorted(files.items()):
        status = (folder / name).stat()
        lines.append(f"{name} {entry.sha256} {status.st_size} {status.st_mtime_ns} {status.st_ino}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _stamp_known(stamp: str) -> bool:
    try:
        return (cache_folder() / "verified" / stamp).exists()
    except (OSError, PPLLaVAError):
        return False


def _remember_stamp(stamp: str) -> None:
    try:
        folder = cache_folder() / "verified"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / stamp).touch()
    except (OSError, PPLLaVAError):
        return  # a read-only home, or none, costs a hash on the next open, nothing else
