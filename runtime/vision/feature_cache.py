"""Encoded videos on disk, so that a restart answers without opening the video decoder.

One safetensors file per video, bundle, engine and way of sampling, below the user's cache folder. A file is written beside its place, checked by size and
checksum when it is read, and removed when the cache grows beyond its limit, the longest unused first. Several processes may share it: nothing is
ever changed in place, and whatever another one removed is simply not there.
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
LIMIT = 4 << 30  # bytes, unless told otherwise
EDGE = 1 << 20  # bytes hashed at a file's beginning and at its end
STALE_PART = 3600  # seconds after which a file that was never finished is removed
SUFFIX = ".features"
FORMAT = "1"


@dataclass
class CachedVideo:
    """arrays: "features" or "states" and "features", as encoded. facts: what else is known of the video, for JSON."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


def content_hash(source: str | os.PathLike[str]) -> str:
    """Of a file's size, first and last megabyte; of a folder's names, sizes and times. Hours of video cost nothing. Raises MediaError."""
    path, digest = Path(source), hashlib.sha256()
    try:
        if path.is_dir():
            for entry in sorted(path.iterdir()):
                s = entry.stat()
                digest.update(f"{entry.name}\0{s.st_size}\0{s.st_mtime_ns}\0".encode())
            return digest.hexdigest()
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size}\0".encode())
            digest.update(file.read(EDGE))
            if size > EDGE:
                file.seek(max(size - EDGE, EDGE))
                digest.update(file.read(EDGE))
    except FileNotFoundError:
        raise MediaError(f"no such file: {source}") from None
    except OSError as error:
        raise MediaError(f"{source} can't be read: {error.strerror}") from None
    return digest.hexdigest()


def bundle_hash(bundle: Bundle) -> str:
    """Of every file's hash in the manifest, and of how frames are prepared."""
    m = bundle.manifest
    parts = {
        "files": {name: entry.sha256 for name, entry in m.files.items()},
        "preprocessing": repr(m.preprocessing),
        "vision": repr(m.vision),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class FeatureCache:
    """folder: default ~/.cache/ppllava-edge/features. limit: bytes of all files together.

    No call raises for a fault of the disk (full, read-only, damaged files): a cache that can't be used costs time, nothing else, and logs why.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit: int = LIMIT):
        self.folder, self.limit = Path(folder) if folder is not None else cache_folder() / "features", limit

    def path(self, *key: object) -> Path:
        """Where what this key stands for is kept."""
        return self.folder / (
            hashlib.sha256(json.dumps([FORMAT, *map(str, key)]).encode()).hexdigest() + SUFFIX
        )

    def load(self, *key: object) -> CachedVideo | None:
        """What was stored under a key, None if nothing (whole) was. A damaged file is removed."""
        from safetensors import SafetensorError, safe_open

        path = self.path(*key)
        try:
            with safe_open(path, "np") as file:
                facts = json.loads(file.metadata()["facts"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
                if json.loads(file.metadata()["checksums"]) != _checksums(file.metadata()["facts"], arrays):
                    raise ValueError("its checksum is wrong")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the cached features %s are damaged (%s); removed", path.name, error)
            _remove(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return CachedVideo(arrays, facts)

    def store(self, video: CachedVideo, *key: object) -> bool:
        """Keep it, and make room. Returns whether it was kept."""
        from safetensors.numpy import save_file

        size = sum(array.nbytes for array in video.arrays.values())
        if size > self.limit:
            log.info("features of %d bytes are not cached: the limit is %d", size, self.limit)
            return False
        path = self.path(*key)
        part = path.with_name(f".{path.stem}.{os.getpid()}.{time.monotonic_ns()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            arrays = {name: np.ascontiguousarray(array) for name, array in video.arrays.items()}
            facts = json.dumps(video.facts)
            save_file(
                arrays, part, metadata={"facts": facts, "checksums": json.dumps(_checksums(facts, arrays))}
            )
            part.replace(path)
        except Exception as error:  # safetensors reports a full disk with an exception of its own
            log.warning("features could not be cached in %s: %s", self.folder, error)
            return False
        finally:
            _remove(part)
        return True

    def _make_room(self, wanted: int) -> None:
        """Remove the longest unused until `wanted` bytes more fit, and parts that crashed processes left."""
        files = sorted(self._files(), key=lambda item: item[1].st_mtime)
        total = sum(s.st_size for _, s in files)
        for path, s in files:
            if total + wanted <= self.limit:
                break
            _remove(path)
            total -= s.st_size
        for path in self.folder.glob(".*.part"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_PART:
                    _remove(path)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):  # another process removed it
                yield path, path.stat()


def _checksums(facts: str, arrays: dict[str, np.ndarray]) -> dict[str, int]:
    found = {
        name: zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        for name, array in arrays.items()
    }
    return {**found, "": zlib.crc32(facts.encode())}


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
