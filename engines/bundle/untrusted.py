"""Opening files of a bundle: regular files only, and only below the bundle's directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from ppllava_edge.engines.errors import BundleError

T = TypeVar("T")


def open_inside(root: Path, path: Path) -> BinaryIO:
    """Open a file of a bundle for reading.

    Links are followed as long as they stay below `root`. Pipes, sockets and devices are refused without
    waiting for them. Checks apply to the opened file, so the file can't be replaced between check and use.

    Args:
        root: The bundle's directory; may itself be a link.
        path: The file, below `root`.

    Raises:
        FileNotFoundError: There is no such file.
        BundleError: It leaves the bundle, isn't a regular file or can't be read; in one line.
    """
    try:
        target = path if path.parent == root and not path.is_symlink() else path.resolve(strict=True)
        if target is not path and not target.is_relative_to(root.resolve()):
            raise BundleError(f"{path} is a link that leaves the bundle; copy the file into it")
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(target, flags | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise BundleError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{path} is not a regular file")
    return open(descriptor, "rb")


def file_size(root: Path, path: Path) -> int:
    """Bytes of a file of a bundle. Raises as open_inside does."""
    with open_inside(root, path) as file:
        return os.fstat(file.fileno()).st_size


def read_limited(root: Path, path: Path, limit: int) -> bytes:
    """Contents of a small file of a bundle.

    Raises:
        FileNotFoundError: There is no such file.
        BundleError: It can't be opened (as open_inside says), or is larger than `limit` bytes.
    """
    with open_inside(root, path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise BundleError(f"{path} can't be read: {error.strerror}") from None
    if len(data) > limit:
        raise BundleError(f"{path} is larger than such a file can be ({limit >> 20} MB)")
    return data


def decode_json(path: Path, data: bytes, kind: type[T]) -> T:
    """Decode JSON into a dataclass whose annotations limit every value.

    Args:
        path: Where the JSON is from, for messages.
        data: UTF-8.
        kind: The dataclass. Unknown keys are ignored; of duplicate keys the last one counts.

    Raises:
        BundleError: It isn't JSON, or a value isn't as annotated; names the value's place, in one line.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise BundleError(f"{path} is damaged: {printable(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: not JSON ({printable(error)})") from None


def printable(text: object, limit: int = 200) -> str:
    """A text from a file, in one line without control characters, for a message or a terminal."""
    line = "".join(c if c.isprintable() else "?" for c in str(text))
    return line if len(line) <= limit else line[:limit] + "…"
