"""Files and a port that no input may make the package open."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from pathlib import Path

IN_OPEN, IN_NONBLOCK = 0x20, 0x800


class Canaries:
    """Watches a folder of files that inputs can name, and listens on a port of 127.0.0.1.

    Args:
        folder: Is made; holds the port's number in the file "port", and the files given.
        files: Contents by name.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: Path, files: dict[str, bytes]):
        self.folder = folder
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        (folder.parent / "port").write_text(str(self._socket.getsockname()[1]))
        libc = ctypes.CDLL(None, use_errno=True)
        self._events = libc.inotify_init1(IN_NONBLOCK)
        if libc.inotify_add_watch(self._events, os.fsencode(folder), IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), f"{folder} can't be watched with inotify")

    def touched(self) -> str:
        """What happened since the last call: "opened", "connected" or ""."""
        found = ""
        with contextlib.suppress(BlockingIOError):
            found = "opened" if os.read(self._events, 1 << 16) else ""
        with contextlib.suppress(BlockingIOError):
            self._socket.accept()[0].close()
            found = "connected"
        return found
