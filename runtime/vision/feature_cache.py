"""Encoded videos on disk, so that a restarted process answers without decoding and encoding a video again.

There is one safetensors file per video, bundle, engine and choice of frames, in the user's cache folder.
When the files exceed the size limit, those unused for longest are removed. Several processes may share the
folder: a file is written under a temporary name and renamed, never changed afterwards, checked by checksum
when it is read, and may vanish at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.integrity import cache_folder
from ppllava_edge.engines.errors import MediaError

log = logging.getLogger(__name__)
DEFAULT_LIMIT = 4 << 30  # bytes
HASHED_EDGE = 1 << 20  # bytes at the beginning and the end of a file that its hash covers
STALE_SECONDS = 3600  # age at which an unfinished file of another process is removed
SUFFIX = ".features"
FORMAT = "1"


@dataclass
class CachedVideo:
    """An encoded video, as it is stored.

    Attributes:
        arrays: "features", or "states" and "features", as the pipeline encodes them.
        facts: Everything else that is known about the video, as JSON.
    """

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


def content_hash(source: str | os.PathLike[str]) -> str:
    """Hash a file or a folder in a short time that doesn't depend on the video's length.

    Args:
        source: The path.

    Returns:
        SHA-256 in hex: of a file's size, first and last megabyte; of the names, sizes and times of a
        folder's files.

    Raises:
        MediaError: If it can't be read.
    """
    path = Path(source)
    try:
        return _folder_hash(path) if path.is_dir() else _file_hash(path)
    except FileNotFoundError:
        raise MediaError(f"no such file: {source}") from None
    except OSError as error:
        raise MediaError(f"{source} can't be read: {error.strerror}") from None


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for entry in sorted(folder.iterdir()):
        s = entry.stat()
        digest.update(f"{entry.name}\0{s.st_size}\0{s.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{size}\0".encode())
        digest.update(file.read(HASHED_EDGE))
        if size > HASHED_EDGE:
            file.seek(max(size - HASHED_EDGE, HASHED_EDGE))
            digest.update(file.read(HASHED_EDGE))
    return digest.hexdigest()


def bundle_hash(bundle: Bundle) -> str:
    """Hash what features depend on in a bundle: its files, and how frames are preprocessed and encoded."""
    m = bundle.manifest
    parts = {
        "files": {name: entry.sha256 for name, entry in m.files.items()},
        "preprocessing": repr(m.preprocessing),
        "vision": repr(m.vision),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class FeatureCache:
    """A folder of encoded videos with a size limit.

    No method raises for a disk error (full, read-only, damaged files): it logs the reason, and the
    video is encoded as if there were no cache.

    Args:
        folder: Default: ~/.cache/ppllava-edge/features.
        limit: Bytes of all files together.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit: int = DEFAULT_LIMIT):
        self.folder = Path(folder) if folder is not None else cache_folder() / "features"
        self.limit = limit

    def path(self, *key: object) -> Path:
        """Return the file of a key, whether it exists or not."""
        digest = hashlib.sha256(json.dumps([FORMAT, *map(str, key)]).encode()).hexdigest()
        return self.folder / (digest + SUFFIX)

    def load(self, *key: object) -> CachedVideo | None:
        """Read the video of a key.

        Returns:
            The video; None if it isn't stored. A damaged file is removed and counts as not stored.
        """
        from safetensors import SafetensorError

        path = self.path(*key)
        try:
            video = _read(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the cached features %s are damaged (%s); removed", path.name, error)
            _remove(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the modification time says when a file was last used
        return video

    def store(self, video: CachedVideo, *key: object) -> bool:
        """Write a video under a key, and make room for it.

        Returns:
            Whether it was stored.
        """
        size = sum(array.nbytes for array in video.arrays.values())
        if size > self.limit:
            log.info("features of %d bytes are not cached: the limit is %d", size, self.limit)
            return False
        path = self.path(*key)
        unfinished = path.with_name(f".{path.stem}.{os.getpid()}.{time.monotonic_ns()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            _write(video, unfinished)
            unfinished.replace(path)
        except Exception as error:  # safetensors reports a full disk with an exception of its own
            log.warning("features could not be cached in %s: %s", self.folder, error)
            return False
        finally:
            _remove(unfinished)
        return True

    def _make_room(self, size: int) -> None:
        """Remove files until `size` more bytes fit, unused for longest first, and stale unfinished files."""
        files = sorted(self._files(), key=lambda item: item[1].st_mtime)
        total = sum(s.st_size for _, s in files)
        for path, s in files:
            if total + size <= self.limit:
                break
            _remove(path)
            total -= s.st_size
        for path in self.folder.glob(".*.part"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    _remove(path)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):  # another process removed it
                yield path, path.stat()


def _read(path: Path) -> CachedVideo:
    """Read a file and check its checksums."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        metadata = file.metadata()
        facts = json.loads(metadata["facts"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if json.loads(metadata["checksums"]) != _checksums(metadata["facts"], arrays):
            raise ValueError("its checksum is wrong")
    return CachedVideo(arrays, facts)


def _write(video: CachedVideo, path: Path) -> None:
    """Write arrays, facts and checksums to one file."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in video.arrays.items()}
    facts = json.dumps(video.facts)
    checksums = json.dumps(_checksums(facts, arrays))
    save_file(arrays, path, metadata={"facts": facts, "checksums": checksums})


def _checksums(facts: str, arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """CRC-32 of every array by name, and of the facts under ""."""
    checksums = {
        name: zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        for name, array in arrays.items()
    }
    return {**checksums, "": zlib.crc32(facts.encode())}


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
