"""HTTP streams on loopback for the tests, MPEG-TS or motion JPEG, that can be cut, stalled or broken."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

BOUNDARY = "frame"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


class StreamServer:
    """Serves frames, again and again. cut() drops every client and refuses new ones; serve() starts again.

    Args:
        frames: Gives RGB uint8 frames.
        kind: mpegts, mpjpeg, garbage, silent (accepts, sends nothing), stalls (some frames, then nothing).
        fps: Frames a second.
        codec: FFmpeg's name of the encoder.
    """

    def __init__(
        self,
        frames: Callable[[], Iterator[np.ndarray]],
        kind: str = "mpegts",
        fps: float = 20.0,
        codec: str = "libx264",
    ):
        self.frames, self.kind, self.fps, self.codec = frames, kind, fps, codec
        self.port = 0
        self.clients = 0
        self._sockets: list[socket.socket] = []
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/stream"

    def __enter__(self) -> StreamServer:
        self.serve()
        return self

    def __exit__(self, *error: object) -> None:
        self.cut()

    def serve(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.clients += 1
                outer._sockets.append(self.connection)
                with contextlib.suppress(OSError, ValueError):
                    outer._send(self)

            def log_message(self, *arguments: object) -> None: ...

        self._server = _Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def cut(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._sockets.clear()

    def _send(self, handler: BaseHTTPRequestHandler) -> None:
        types = {"mpjpeg": f"multipart/x-mixed-replace; boundary={BOUNDARY}"}
        handler.send_response(200)
        handler.send_header("Content-Type", types.get(self.kind, "video/mp2t"))
        handler.end_headers()
        if self.kind == "silent":
            time.sleep(60)
        elif self.kind == "garbage":
            rng = np.random.default_rng(0)
            for _ in range(200):
                handler.wfile.write(rng.bytes(65536))
        elif self.kind == "mpjpeg":
            self._motion_jpeg(handler.wfile)
        else:
            self._transport_stream(handler.wfile)

    def _motion_jpeg(self, out: Any) -> None:
        from PIL import Image

        for image in self.frames():
            data = io.BytesIO()
            Image.fromarray(image).save(data, "JPEG", quality=92)
            out.write(
                f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {data.tell()}\r\n\r\n".encode()
                + data.getvalue()
                + b"\r\n"
            )
            time.sleep(1 / self.fps)

    def _transport_stream(self, out: Any) -> None:
        import av

        class Writer:
            def write(self, data: bytes) -> int:
                out.write(data)
                return len(data)

        stream, container, codec = None, None, ""
        for sent, image in enumerate(self.frames(), 1):
            if (
                stream is None or (stream.height, stream.width) != image.shape[:2] or codec != self.codec
            ):  # a reconfigured camera restarts its encoder
                codec = self.codec
                container = av.open(
                    Writer(), "w", format="mpegts", options={"flush_packets": "1", "muxdelay": "0"}
                )
                stream = container.add_stream(self.codec, rate=round(self.fps))
                stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
                stream.options = (
                    {"tune": "zerolatency", "g": "5", "crf": "18", "preset": "veryfast"}
                    if self.codec == "libx264"
                    else {"g": "5", "b": "2M"}
                )
            for packet in stream.encode(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            ):
                container.mux(packet)
            if self.kind == "stalls" and sent > 30:
                time.sleep(60)
            time.sleep(1 / self.fps)


def forever(frames: np.ndarray) -> Callable[[], Iterator[np.ndarray]]:
    """The frames, again and again."""

    def play() -> Iterator[np.ndarray]:
        while True:
            yield from frames

    return play


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    """Whether the condition became true within the given seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()
