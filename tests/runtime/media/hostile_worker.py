"""Decoding processes that misbehave: what a hostile file could make of one. The source's name says how."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from typing import Any

from ppllava_edge.runtime.media.isolation.protocol import MAX_REQUEST, Channel

OPENED = {"type": "opened", "kind": "video", "count": 10, "fps": 5.0, "duration": 2.0}
FRAME = {"type": "frame", "number": 0, "seconds": 0.0, "height": 16, "width": 16}
LONG_TEXT = "a\nb\x1b[2J\x00\u202ec" + "d" * 30_000


def main(parent: int) -> None:
    """Take the request, then misbehave."""
    connection = socket.socket(fileno=os.dup(0))
    channel = Channel(connection, MAX_REQUEST)
    channel.send({"type": "ready"})
    name = os.path.basename(bytes.fromhex(channel.receive()["source"]).decode())
    if name.startswith("{"):  # a message instead of "opened"
        channel.send(json.loads(name))
    else:
        {
            "hang": lambda: time.sleep(1000),
            "spin": spin,
            "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
            "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "leave": lambda: os._exit(7),
            "disconnect": lambda: disconnect(connection),
            "large header": lambda: connection.sendall(b"\xff\xff\xff\xff" + bytes(1000)),
            "no json": lambda: connection.sendall((4).to_bytes(4, "big") + b"\xff{]}"),
            "deep json": lambda: connection.sendall((60_000).to_bytes(4, "big") + b"[" * 60_000),
            "no object": lambda: connection.sendall((2).to_bytes(4, "big") + b"[]"),
            "long error": lambda: channel.send({"type": "error", "text": LONG_TEXT}),
            "trickle": lambda: trickle(connection),
            "unasked frame": lambda: after_choice(channel, {**FRAME, "number": 9}),
            "large frame": lambda: after_choice(channel, {**FRAME, "height": 10**9}),
            "long frame": lambda: after_choice(channel, {**FRAME, "height": 16384, "width": 16384}),
            "no seconds": lambda: after_choice(channel, {**FRAME, "seconds": float("nan")}),
            "notes": lambda: after_choice(
                channel, FRAME, pixels(), done(notes=["x\x1b[2J" * 1000 for _ in "ab"])
            ),
            "many notes": lambda: after_choice(channel, FRAME, pixels(), done(notes=["x"] * 1000)),
            "frame twice": lambda: after_choice(channel, FRAME, pixels(), FRAME, pixels()),
            "no frame": lambda: after_choice(channel, done()),
            "choose for ever": lambda: choose_for_ever(channel),
            "half a frame": lambda: after_choice(channel, FRAME, pixels()[:100]),
        }[name]()
    time.sleep(1000)


def done(**fields: Any) -> dict[str, Any]:
    """The message at the end."""
    return {**OPENED, "type": "done", "notes": [], **fields}


def pixels() -> bytes:
    """Those of FRAME."""
    return bytes(16 * 16 * 3)


def spin() -> None:
    """Use the processor for ever."""
    while True:
        pass


def disconnect(connection: socket.socket) -> None:
    """Close the connection and live on."""
    connection.close()
    os.close(0)


def trickle(connection: socket.socket) -> None:
    """A byte now and then."""
    while True:
        connection.sendall(b"\0")
        time.sleep(0.05)
        if connection.fileno() < 0:
            return


def after_choice(channel: Channel, *parts: Any) -> None:
    """Behave until frames were chosen, then send messages and bytes."""
    channel.send(OPENED)
    channel.receive()
    channel.send({**OPENED, "type": "choose"})
    channel.receive()
    for part in parts:
        if isinstance(part, bytes):
            channel._send(part)
        else:
            channel.send(part)


def choose_for_ever(channel: Channel) -> None:
    """Ask for frames again and again."""
    channel.send(OPENED)
    channel.receive()
    while True:
        channel.send({**OPENED, "type": "choose"})
        channel.receive()
