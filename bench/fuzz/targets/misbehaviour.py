"""A target that misbehaves as its input says: by it, tests see that the server notices."""

from __future__ import annotations

import ctypes
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from ppllava_edge.bench.fuzz.targets.target import Target, expect
from ppllava_edge.engines.errors import MediaError


def misbehave(path: Path, scratch: Path) -> None:
    """Do what the input names."""
    BEHAVIOURS[path.read_text()](scratch)


def _refuse(message: str) -> Callable[[Path], None]:
    def refuse(scratch: Path) -> None:
        raise MediaError(message)

    return refuse


def _crash(scratch: Path) -> None:
    ctypes.string_at(8)


def _crash_in_a_thread(scratch: Path) -> None:
    thread = threading.Thread(target=_crash, args=(scratch,))
    thread.start()
    thread.join()


def _compute_for_ever(scratch: Path) -> None:
    while True:
        pass


def _allocate(scratch: Path) -> None:
    bytearray(8 << 30)


def _use_memory(scratch: Path) -> None:
    bytearray(b"x" * (700 << 20))


def _connect(scratch: Path) -> None:
    socket.create_connection(("127.0.0.1", int((scratch.parent / "port").read_text()))).close()


def _raise(error: BaseException) -> Callable[[Path], None]:
    def throw(scratch: Path) -> None:
        raise error

    return throw


BEHAVIOURS: dict[str, Callable[[Path], object]] = {
    "good": lambda scratch: None,
    "refuse": _refuse("it is damaged"),
    "crash": _crash,
    "crash in a thread": _crash_in_a_thread,
    "compute for ever": _compute_for_ever,
    "allocate": _allocate,
    "use memory": _use_memory,
    "several lines": _refuse("one\ntwo"),
    "long": _refuse("x" * 301),
    "control characters": _refuse("\x1b[2J"),
    "exception": _raise(KeyError("x")),
    "surrogates": _raise(ValueError("\ud800")),
    "base exception": _raise(SystemExit(0)),
    "wrong result": lambda scratch: expect(False, "frames: none"),
    "print": lambda scratch: print("x"),
    "open": lambda scratch: (scratch.parent / "canaries" / "video.mp4").read_bytes(),
    "connect": _connect,
}
MISBEHAVIOUR = Target("misbehaviour", misbehave, ".txt", weight=0)
