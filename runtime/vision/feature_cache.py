"""Encoded videos on disk, so that a restarted process answers without decoding and encoding a video again.

There is one safetensors file per video, bundle, engine and choice of frames, in the user's cache folder.
When the files exceed the size limit, those unused for longest are removed. Several processes may share the
folder: a file is written in a staging folder and renamed, never changed afterwards, checked by checksum when
it is read, and may vanish at any time. Files are not synced to disk: a power cut may damage an entry, which
its checksum shows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.integrity import cache_folder
from ppllava_edge.engines.errors import MediaError, PPLLaVAError
from ppllava_edge.engines.staging import staging_folder, sweep
from ppllava_edge.runtime.media.opening.paths import display_name

log = logging.getLogger(__name__)
DEFAULT_LIMIT = 4 << 30  # bytes
HASHED_EDGE = 1 << 20  # bytes at the beginning and the end of a file that its hash covers
STALE_SECONDS = 24 * 3600  # age at which what other hosts and older versions left unfinished is removed
MAX_HEADER = 4 << 20  # bytes of a file before its arrays: their shapes, and the facts
IN_MEMORY = 512 << 20  # bytes; larger arrays are mapped from the file
SUFFIX = ".features"
FORMAT = "2"
DTYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I8": np.int8}
OPENING = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
)
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


class _Tensor(msgspec.Struct):
    """An array in a safetensors header."""

    dtype: str
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=8)]
    data_offsets: tuple[Count, Count]


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
        SHA-256 in hex: of a file's size, time of change, first and last megabyte; of the names, sizes and
        times of a folder's files. So a copy has the same hash if it was copied with its time.

    Raises:
        MediaError: If it can't be read, or is neither a regular file nor a folder.
    """
    path = Path(source)
    try:
        return _folder_hash(path) if path.is_dir() else _file_hash(path)
    except FileNotFoundError:
        raise MediaError(f"no such file: {display_name(source)}") from None
    except OSError as error:
        raise MediaError(f"{display_name(source)} can't be read: {error.strerror}") from None


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for entry in sorted(folder.iterdir()):
        s = entry.stat() if entry.exists() else entry.lstat()  # a link to nothing is no picture
        digest.update(os.fsencode(entry.name) + f"\0{s.st_size}\0{s.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    # The path may be a link. It may also be a pipe by now, which would block without O_NONBLOCK.
    with open(os.open(path, OPENING & ~getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{display_name(path)} is not a regular file")
        size = status.st_size
        digest.update(f"{size}\0{status.st_mtime_ns}\0".encode())
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
        folder: Created with permissions for its owner only. Default: ~/.cache/ppllava-edge/features.
        limit: Bytes of all files together.

    Raises:
        PPLLaVAError: If the folder isn't one, other users may write to it (they could change what videos
            show), or the limit isn't a number of bytes.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit: int = DEFAULT_LIMIT):
        self.folder = Path(folder) if folder is not None else cache_folder() / "features"
        self.limit = limit
        if not isinstance(limit, int | np.integer) or limit < 0:
            raise PPLLaVAError(f"the cache's limit must be a number of bytes, 0 or more, not {limit!r}")
        self._swept = False
        _check_owner(self.folder)

    def path(self, *key: object) -> Path:
        """Return the file of a key, whether it exists or not."""
        digest = hashlib.sha256(json.dumps([FORMAT, *map(str, key)]).encode()).hexdigest()
        return self.folder / (digest + SUFFIX)

    def load(self, *key: object) -> CachedVideo | None:
        """Read the video of a key.

        Returns:
            The video; None if it isn't stored. A damaged file is removed and counts as not stored.
        """
        self._sweep()
        path = self.path(*key)
        try:
            video = _read(path, self.limit + MAX_HEADER)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
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
        self._sweep()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(size)
            with staging_folder(path, log.info) as staging:
                _write(video, staging / path.name)
                (staging / path.name).replace(path)
        except Exception as error:  # safetensors reports a full disk with an exception of its own
            log.warning("features could not be cached in %s: %s", self.folder, error)
            return False
        return True

    def _sweep(self) -> None:
        """Once per cache, remove what killed processes left."""
        if not self._swept:
            self._swept = True
            for name in sweep(self.folder):
                log.info("removed %s of a killed process from %s", name, self.folder)

    def _make_room(self, size: int) -> None:
        """Remove files until `size` more bytes fit, unused for longest first; and stale unfinished ones."""
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
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):  # another process removed it
                yield path, path.stat()


def _check_owner(folder: Path) -> None:
    """Refuse a folder that users other than this one and root may write to. Raises PPLLaVAError."""
    try:
        status = folder.stat()
    except OSError:
        return  # it will be created, or storing fails with a warning
    if not stat.S_ISDIR(status.st_mode):
        raise PPLLaVAError(f"the cache folder {folder} is a file; name a folder")
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    if user and status.st_uid not in (user, 0):
        raise PPLLaVAError(f"the cache folder {folder} belongs to another user; name another one")
    if hasattr(os, "geteuid") and status.st_mode & stat.S_IWOTH:
        raise PPLLaVAError(
            f"every user may write to the cache folder {folder}, and so change what videos show; "
            f"name another one, or: chmod o-w {folder}"
        )


def _read(path: Path, limit: int) -> CachedVideo:
    """Read a file of at most `limit` bytes: first the header, whose sizes are checked before they are used.

    Its layout is read here and not by safetensors, which opens by name only and can't map arrays.
    """
    with open(os.open(path, OPENING), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise ValueError("it is not a regular file of a possible size")
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, status.st_size):
            raise ValueError("its header is too long")
        header = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop("__metadata__"), type=dict[str, str])
        tensors = {name: msgspec.json.decode(raw, type=_Tensor) for name, raw in header.items()}
        if (
            sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors.values())
            > status.st_size
        ):
            raise ValueError("its arrays overlap")  # each would be read anew
        arrays = {name: _array(file, tensor, 8 + length, status.st_size) for name, tensor in tensors.items()}
    checksums = msgspec.json.decode(metadata["checksums"], type=dict[str, int])
    if checksums != _checksums(metadata["facts"], arrays):
        raise ValueError("its checksum is wrong")
    return CachedVideo(arrays, msgspec.json.decode(metadata["facts"], type=dict[str, Any]))


def _array(file: BinaryIO, tensor: _Tensor, start: int, size: int) -> np.ndarray:
    """An array of a file of `size` bytes whose data begins at `start`; mapped if it is large."""
    dtype = np.dtype(DTYPES[tensor.dtype])
    first, end = tensor.data_offsets
    if end - first != prod(tensor.shape) * dtype.itemsize or start + end > size:
        raise ValueError("an array is not of the size that its shape needs")
    if end - first > IN_MEMORY:
        return np.memmap(file, dtype, "c", start + first, tensor.shape)
    array = np.empty(tensor.shape, dtype)
    file.seek(start + first)
    if array.size and file.readinto(array.reshape(-1).view(np.uint8).data) != end - first:  # type: ignore[attr-defined]
        raise ValueError("it was cut off")
    return array


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
