"""Names of sources, and files opened so that a name can't stand for anything but a regular file."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from typing import BinaryIO

from ppllava_edge.engines.errors import MediaError

CREDENTIALS = re.compile(r"([a-z][a-z0-9+.-]+:/{1,2})[^/]*@", re.IGNORECASE)  # of a Path: one slash
ADDRESS = re.compile(r"(https?|rtsps?|s?rtp|rtmp\w*|udp|tcp|tls|srt|rist):/", re.IGNORECASE)
LONGEST_NAME = 300  # characters of a name in an error message
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def source_name(source: object) -> str:
    """A source's path or address as text.

    Args:
        source: str, bytes or a path-like object. Bytes that aren't UTF-8 become surrogates, as in os.listdir.

    Raises:
        MediaError: If it is none of these, is empty, or holds what no file's name can hold.
    """
    if not isinstance(source, (str, bytes, os.PathLike)):
        raise MediaError(f"a source is a path, an address or frames, not {type(source).__name__}")
    name = os.fsdecode(source)
    if not name:
        raise MediaError("the source's name is empty")
    if "\0" in name:
        raise MediaError(f"{display_name(name)}: a name can't hold a null character")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise MediaError(f"{display_name(name)}: half a surrogate pair is in the name") from None
    return name


def display_name(source: str | os.PathLike[str]) -> str:
    """A name for messages: one line, without control characters, shortened in the middle if it is long.

    An address is shown without its user and password: messages go into logs.
    """
    name = CREDENTIALS.sub(r"\1***@", os.fspath(source))
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2]}...{name[-LONGEST_NAME // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def stat_source(name: str | os.PathLike[str]) -> os.stat_result:
    """What a name stands for; links are followed.

    Raises:
        MediaError: If there is no such file, or it can't be reached.
    """
    try:
        return os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        hint = "; streams are watched live (live() or --live)" if ADDRESS.match(os.fspath(name)) else ""
        raise MediaError(f"no such file: {display_name(name)}{hint}") from None
    except OSError as error:
        raise MediaError(f"{display_name(name)} can't be opened ({error.strerror or error})") from None


@contextlib.contextmanager
def open_regular(name: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Nothing else is ever opened: opening a device can have effects, and opening a named pipe waits for its
    writer. The file is checked again once it is open, in case the name was given to another in between.

    Args:
        name: The path; links are followed.

    Yields:
        The file, at its beginning.

    Raises:
        MediaError: If it is not a regular file, is empty, or can't be opened.
    """
    check_regular(name)
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise MediaError(f"{display_name(name)} can't be opened ({error.strerror or error})") from None
    with open(descriptor, "rb") as file:
        _check_regular(os.fstat(descriptor), name)
        yield file


def check_regular(name: str | os.PathLike[str]) -> None:
    """Raise MediaError if a name doesn't stand for a regular file that holds something."""
    _check_regular(stat_source(name), name)


def _check_regular(status: os.stat_result, name: str | os.PathLike[str]) -> None:
    """Refuse what isn't a regular file, by name, and empty files (all of /proc)."""
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for test, kind in KINDS if test(status.st_mode)), "something else")
        raise MediaError(f"{display_name(name)} is {kind}, not a regular file")
    if status.st_size == 0:
        raise MediaError(f"{display_name(name)} is empty (0 bytes)")
