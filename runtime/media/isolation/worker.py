"""The decoding process: opens one source, and sends the frames that the parent chooses.

Messages: "ready" to the parent, which sends the request; "opened" with facts about the source; then, at the
parent's "read", "choose" with the facts as they are by then, which the parent answers with frame numbers;
"frame" with its pixels, for every chosen frame; "done". An "error" may come at any time.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ppllava_edge.engines.errors import MediaError, PPLLaVAError
from ppllava_edge.runtime.media.isolation.confinement import address_space, confine
from ppllava_edge.runtime.media.isolation.protocol import MAX_REQUEST, Channel, Disconnected, Message
from ppllava_edge.runtime.media.limits import MediaLimits, MemoryShortage
from ppllava_edge.runtime.media.opening.paths import display_name
from ppllava_edge.runtime.media.readers import FrameReader, open_reader

MIN_MEMORY = 64 * 2**20  # bytes beside the interpreter and the libraries


def main(parent: int) -> NoReturn:
    """Decode one source for the parent process. Never returns."""
    serve(parent, send_frames)


def serve(parent: int, work: Callable[[Channel, Message], None]) -> NoReturn:
    """Take a request from the parent process, fulfil it in confinement, and end this process.

    Args:
        parent: Its process id.
        work: Fulfils the request; errors it raises are sent to the parent.
    """
    channel = Channel(_take_connection(), MAX_REQUEST)
    _load_decoders()
    try:
        channel.send({"type": "ready"})
        request = channel.receive()
        limits = MediaLimits(**request["limits"])
        try:
            _check_memory(limits)
            confine(limits, parent)
            work(channel, request)
        except Disconnected:
            raise
        except (MemoryError, MemoryShortage):
            what, megabytes = (
                display_name(os.fsdecode(bytes.fromhex(request["source"]))),
                limits.memory / 10**6,
            )
            fail(
                channel,
                f"{what} needs more memory to decode than {megabytes:.0f} MB; raise the limit memory",
            )
        except PPLLaVAError as error:
            fail(channel, str(error))
        except Exception as error:
            fail(channel, f"the decoding process failed: {type(error).__name__}: {error}")
    except Disconnected:
        os._exit(1)
    os._exit(0)  # without freeing decoders, which can take long or crash


def _check_memory(limits: MediaLimits) -> None:
    """Refuse a memory limit that leaves nothing to decode with."""
    needed = address_space() + MIN_MEMORY
    if limits.memory < needed:
        raise MediaError(
            f"the limit memory ({limits.memory / 10**6:.0f} MB) is too small: "
            f"a decoding process needs {needed / 10**6:.0f} MB at least"
        )


def fail(channel: Channel, text: str) -> None:
    """Report an error to the parent."""
    channel.send({"type": "error", "text": text})


def send_frames(channel: Channel, request: Message) -> None:
    """Open a source, let the parent choose, and send the frames. Raises what the reader raises."""
    reader = open_reader(os.fsdecode(bytes.fromhex(request["source"])), MediaLimits(**request["limits"]))
    channel.send({"type": "opened", "kind": reader.kind, **_facts(reader)})
    channel.receive()  # "read"

    def choice(reader: FrameReader) -> Sequence[int]:
        channel.send({"type": "choose", **_facts(reader)})
        numbers: list[int] = channel.receive()["numbers"]
        return numbers

    for number, image, seconds in reader.frames(choice):
        height, width = image.shape[:2]
        frame = {"type": "frame", "number": number, "seconds": seconds, "height": height, "width": width}
        channel.send(frame, image)
    channel.send({"type": "done", "notes": reader.notes, **_facts(reader)})


def _facts(reader: FrameReader) -> dict[str, Any]:
    return {"count": reader.count, "fps": float(reader.fps), "duration": float(reader.duration)}


def _take_connection() -> socket.socket:
    """The socket that the parent gave as standard input, which becomes empty."""
    connection = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    return connection


def _load_decoders() -> None:
    """Import what decoding needs, before memory and files are limited."""
    import av  # noqa: F401
    from PIL import Image, ImageOps  # noqa: F401

    Image.init()
