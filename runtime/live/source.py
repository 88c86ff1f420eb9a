"""Where live frames come from: a file played in real time, a camera, a network stream. Lost streams are opened again, with growing pauses."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.container import apply_rotation, check_size, reason, video_stream

log = logging.getLogger(__name__)
BACK_OFF = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds before each further attempt; the last is repeated
ERRORS_ALLOWED = 200  # packets in a row that fail before a stream counts as lost
LIVE_OPTIONS = {"fflags": "nobuffer", "flags": "low_delay"}
SCHEME_OPTIONS = {"rtsp": {"rtsp_transport": "tcp"}, "rtsps": {"rtsp_transport": "tcp"}}
CONNECTING, PLAYING, RECONNECTING, ENDED, CLOSED = "connecting", "playing", "reconnecting", "ended", "closed"

Wanted = Callable[[float], bool]  # whether the frame of that time (seconds) is to be encoded
Offer = Callable[[np.ndarray, float], None]
OnState = Callable[[str, str], None]  # state, why


class StreamReader:
    """Reads a source in a thread until it ends or is closed; every frame that is wanted goes to `offer`.

    realtime: play files at their own pace. reconnect: open streams again when they are lost. timeout: seconds without data, or without a frame, after
    which a stream counts as lost. format, options: FFmpeg's, for devices and odd streams.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        wanted: Wanted,
        offer: Offer,
        on_state: OnState,
        realtime: bool = True,
        reconnect: bool = True,
        timeout: float = 10.0,
        format: str | None = None,
        options: Mapping[str, str] | None = None,
    ):
        self.source, self.wanted, self.offer, self.on_state = os.fspath(source), wanted, offer, on_state
        self.realtime, self.timeout = realtime, timeout
        self.is_file = "://" not in self.source and not self.source.startswith("/dev/") and format is None
        self.reconnect = reconnect and not self.is_file
        self.format = format or ("v4l2" if self.source.startswith("/dev/video") else None)
        scheme = self.source.split("://", 1)[0] if "://" in self.source else ""
        self.options = {
            **({} if self.is_file else LIVE_OPTIONS),
            **SCHEME_OPTIONS.get(scheme, {}),
            **(options or {}),
        }
        self.seen = self.losses = 0
        self.size: tuple[int, int] | None = None
        self._closed = threading.Event()
        self._began = time.monotonic()
        if self.is_file and not Path(self.source).is_file():
            raise MediaError(f"no such file: {self.source}")
        self._thread = threading.Thread(target=self._run, name="ppllava-live-source", daemon=True)

    def start(self) -> None:
        """Begin reading."""
        self._thread.start()

    def close(self, grace: float = 1.0) -> None:
        """Stop. A read that hangs in the network ends by itself at its timeout; it is waited for at most `grace` seconds."""
        self._closed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(grace)

    def _run(self) -> None:
        attempt = 0
        while not self._closed.is_set():
            before = self.seen
            try:
                self._read()
                why = "the stream ended"
            except MediaError as error:
                why = str(error)
            except Exception as error:
                log.exception("reading %s failed", self.source)
                why = f"{type(error).__name__}: {error}"
            if self._closed.is_set():
                break
            if not self.reconnect:
                self.on_state(ENDED, "" if self.is_file and why == "the stream ended" else why)
                return
            attempt = 0 if self.seen > before else attempt
            self.losses += 1
            pause = BACK_OFF[min(attempt, len(BACK_OFF) - 1)]
            attempt += 1
            log.warning("%s: %s; trying again in %g s", self.source, why, pause)
            self.on_state(RECONNECTING, f"{why}; trying again every {pause:g} s")
            self._closed.wait(pause)
        self.on_state(CLOSED, "")

    def _read(self) -> None:
        """Open the source and read it to its end. Raises MediaError for a stream that can't be opened or is lost."""
        import av

        try:
            container = av.open(
                self.source,
                format=self.format,
                options=dict(self.options),
                timeout=None if self.is_file else self.timeout,
                metadata_errors="replace",
            )
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise MediaError(f"{self.source} can't be opened ({reason(error)})") from None
        with container:
            stream = video_stream(container, self.source)
            stream.thread_type = (
                "AUTO" if self.is_file else "SLICE"
            )  # threads per frame would hold frames back
            try:
                self._play(container, stream)
            except av.error.FFmpegError as error:
                raise MediaError(f"{self.source} was lost ({reason(error)})") from None

    def _play(self, container: Any, stream: Any) -> None:
        import av

        errors, last_frame, began, first = 0, time.monotonic(), time.monotonic(), None
        for packet in container.demux(stream):
            if self._closed.is_set():
                return
            try:
                frames = packet.decode()
                errors = 0
            except av.error.EOFError:
                return
            except av.error.FFmpegError as error:
                frames, errors = [], errors + 1
                if errors > ERRORS_ALLOWED:
                    raise MediaError(f"{self.source} can't be decoded any more ({reason(error)})") from None
            for frame in frames:
                self.seen += 1
                last_frame = time.monotonic()
                if self.seen == 1 or self.size != (frame.width, frame.height):
                    self.size = (frame.width, frame.height)
                    check_size(frame.width, frame.height, self.source)
                self.on_state(PLAYING, "")
                seconds = last_frame - self._began
                if self.is_file:
                    seconds = (
                        float(frame.pts * frame.time_base)
                        if frame.pts is not None and frame.time_base
                        else self.seen / 25
                    )
                    first = seconds if first is None else first
                    seconds -= first
                    if self.realtime and self._closed.wait(max(began + seconds - last_frame, 0)):
                        return
                if self.wanted(seconds):
                    self.offer(apply_rotation(frame), seconds)
            if not self.is_file and time.monotonic() - last_frame > self.timeout:
                raise MediaError(f"{self.source} gave no frame for {self.timeout:g} s")
