"""A live source that a child process opens and decodes. Its death is a lost stream, which is opened again."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from ppllava_edge.runtime.live.source import Deliver, IsDue, LiveSource
from ppllava_edge.runtime.media.isolation.process import DecodingProcess, Interrupted
from ppllava_edge.runtime.media.isolation.protocol import Channel, Message, integer, number
from ppllava_edge.runtime.media.isolation.worker import serve
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, MediaLimits, check_size

MODULE = "ppllava_edge.runtime.live.isolated_source"  # the child runs its main
NETWORK_VARIABLES = ("http_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR")  # that FFmpeg reads
GRACE = 5.0  # seconds beside the source's own timeouts, in which the process reports them itself


class IsolatedSource(LiveSource):
    """A LiveSource in a child process. Arguments, attributes and errors: see LiveSource.

    The child asks for every frame whether it is due; only those that are due are sent.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        is_due: IsDue,
        deliver: Deliver,
        realtime: bool = True,
        timeout: float = 10.0,
        format: str | None = None,
        options: Mapping[str, str] | None = None,
        limits: MediaLimits = DEFAULT_LIMITS,
    ):
        super().__init__(source, is_due, deliver, realtime, timeout, format, options, limits)
        self._process_limits = dataclasses.replace(limits, decode_seconds=None)  # streams have no end
        self._began = 0.0  # when a file's first frame came
        self._request: Message = {
            "source": os.fsencode(source).hex(),
            "timeout": timeout,
            "format": format,
            "options": dict(options or {}),
            "limits": dataclasses.asdict(self._process_limits),
        }

    def read(self, closed: threading.Event, on_frame: Callable[[], None]) -> None:
        """See LiveSource.read."""
        try:
            process = DecodingProcess(
                MODULE, self.name, self._process_limits, NETWORK_VARIABLES, interrupted=closed.is_set
            )
        except Interrupted:
            return
        try:
            # A stream reports its timeouts itself: it may take one to connect and one for its first data.
            process.silence = None if self.is_file else 2 * self.timeout + GRACE
            process.send(self._request)
            while self._take_frame(process, closed, on_frame):
                pass
        except Interrupted:
            pass
        finally:
            process.close()

    def _take_frame(
        self, process: DecodingProcess, closed: threading.Event, on_frame: Callable[[], None]
    ) -> bool:
        """Receive the next frame, and deliver it if it is due. Returns whether there may be another."""
        message = process.receive("frame", "end")
        if message["type"] == "end":
            return False
        now = time.monotonic()
        with process.checking():
            width = integer(message, "width", 1, self.limits.max_side)
            height = integer(message, "height", 1, self.limits.max_side)
            seconds = number(message, "seconds") if self.is_file else now - self._created
        check_size(width, height, self.name, self.limits)
        self.seen += 1
        self.size = width, height
        on_frame()
        if self.is_file and self.realtime:
            self._began = now if self.seen == 1 else self._began
            if closed.wait(min(max(self._began + seconds - now, 0.0), threading.TIMEOUT_MAX)):
                return False
        due = bool(self._is_due(seconds))
        process.send({"due": due})
        if due:
            image = process.receive_image(process.receive("image"))
            self._deliver(image, seconds)
        return not closed.is_set()


def main(parent: int) -> None:
    """Decode one live source for the parent process. Never returns."""
    serve(parent, send_stream)


def send_stream(channel: Channel, request: Message) -> None:
    """Play a source: announce every frame, and send those that the parent finds due."""

    def is_due(seconds: float) -> bool:
        assert source.size is not None
        width, height = source.size
        channel.send({"type": "frame", "seconds": seconds, "width": width, "height": height})
        due: bool = channel.receive()["due"]
        return due

    def deliver(image: np.ndarray, seconds: float) -> None:
        height, width = image.shape[:2]
        channel.send({"type": "image", "width": width, "height": height}, image)

    source = LiveSource(
        os.fsdecode(bytes.fromhex(request["source"])),
        is_due,
        deliver,
        realtime=False,  # the parent waits for a file's frames to be due
        timeout=request["timeout"],
        format=request["format"],
        options=request["options"],
        limits=MediaLimits(**request["limits"]),
    )
    source.read(threading.Event(), lambda: None)
    channel.send({"type": "end"})
