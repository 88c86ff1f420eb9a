"""Messages between the parent and a decoding process: JSON headers, and the pixels of frames.

A message is four bytes that hold the header's length, then the header, a JSON object in UTF-8. The message
"image" is followed by the frame's pixels, RGB uint8 (H, W, 3), whose size its header gives.

The parent checks every field it receives: the process may have been taken over by a hostile file.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_HEADER = 64 * 1024  # bytes that the parent accepts; what it sends itself may be longer
MAX_REQUEST = 2**31  # bytes that the child accepts from its parent
MAX_NUMBER = 1e12  # of any field; seconds in 30 000 years

Message = dict[str, Any]


class ProtocolError(Exception):
    """The other side sent what the protocol doesn't allow."""


class Disconnected(Exception):
    """The other side is gone."""


class Channel:
    """One end of the connection.

    Args:
        connection: A connected stream socket.
        max_header: Bytes of the longest header to accept.
        watch: Called whenever a part of a message went through or the socket's timeout passed; ends the
            waiting by raising.
    """

    def __init__(self, connection: socket.socket, max_header: int, watch: Callable[[], None] = lambda: None):
        self._socket, self._max_header, self._watch = connection, max_header, watch

    def send(self, message: Message, image: np.ndarray | None = None) -> None:
        """Send a message, with the pixels of an image (H, W, 3) uint8 if there is one.

        Raises:
            Disconnected: If nobody reads it.
        """
        header = json.dumps(message).encode()
        self._send(len(header).to_bytes(4, "big") + header)
        if image is not None:
            self._send(np.ascontiguousarray(image).data.cast("B"))

    def receive(self) -> Message:
        """Wait for a message.

        Raises:
            Disconnected: If none comes any more.
            ProtocolError: If it isn't a message.
        """
        length = int.from_bytes(self._receive(4), "big")
        if length > self._max_header:
            raise ProtocolError(f"a header of {length} bytes")
        header = self._receive(length)
        try:
            message = json.loads(header.decode())
        except (ValueError, RecursionError):
            raise ProtocolError("a header that isn't JSON") from None
        if not isinstance(message, dict):
            raise ProtocolError("a header that isn't an object")
        return message

    def receive_image(self, height: int, width: int) -> np.ndarray:
        """Wait for the pixels of an image whose size was checked. Returns RGB uint8 (H, W, 3)."""
        image = np.empty((height, width, 3), np.uint8)
        self._fill(image.data.cast("B"))
        return image

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _send(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except TimeoutError:
                pass
            except OSError:
                raise Disconnected from None
            self._watch()

    def _receive(self, length: int) -> bytearray:
        data = bytearray(length)
        self._fill(memoryview(data))
        return data

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                count = self._socket.recv_into(view)
                if count == 0:
                    raise Disconnected
                view = view[count:]
            except TimeoutError:
                pass
            except OSError:
                raise Disconnected from None
            self._watch()


def integer(message: Message, name: str, low: int, high: int) -> int:
    """A field that must be a whole number from `low` to `high`. Raises ProtocolError."""
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ProtocolError(f"{name} = {str(value)[:40]}")
    return value


def number(message: Message, name: str, low: float = -MAX_NUMBER, high: float = MAX_NUMBER) -> float:
    """A field that must be a number from `low` to `high`. Raises ProtocolError."""
    value = message.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise ProtocolError(f"{name} = {str(value)[:40]}")  # NaN is in no range either
    return float(value)


def text(value: object, longest: int) -> str:
    """Text from the child: one line of at most `longest` characters, without control characters."""
    if not isinstance(value, str):
        raise ProtocolError("text that isn't a string")
    value = value[:longest]
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())
