"""Live sources: a file played in real time, a camera, a network stream; read until they end or are lost."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.container import (
    check_memory,
    open_container,
    read_all_packets,
    reason,
    to_rgb,
    video_stream,
)
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, Budget, MediaLimits, check_size
from ppllava_edge.runtime.media.opening.allowed import address_options, scheme_of
from ppllava_edge.runtime.media.opening.paths import check_regular, display_name, source_name

MAX_ERRORS = 200  # consecutive packets that can't be decoded before a stream counts as lost
LIVE_OPTIONS = {"fflags": "nobuffer", "flags": "low_delay"}
SCHEME_OPTIONS = {"rtsp": {"rtsp_transport": "tcp"}, "rtsps": {"rtsp_transport": "tcp"}}
FALLBACK_FPS = 25.0  # for files without timestamps

IsDue = Callable[[float], bool]  # whether the frame of that time (seconds) is to be encoded
Deliver = Callable[[np.ndarray, float], None]  # RGB uint8 (H, W, 3), seconds


class LiveSource:
    """A file, a device or a stream that delivers frames.

    Args:
        source: A path, a camera (/dev/video0) or an address (rtsp://, http://, udp://, srt://, …).
        is_due: Called with every frame's time; only frames that are due are converted and delivered.
        deliver: Takes the frames that are due.
        realtime: Play files at their own pace.
        timeout: Seconds without data, or without a frame, after which a stream counts as lost.
        format: FFmpeg's input format, for devices and unusual streams. What it may open is then the app's
            choice: no allow-list holds.
        options: FFmpeg's input options; they come before those set here.
        limits: What the source may cost; decode_seconds and max_pixels don't hold, as streams have no end.

    Attributes:
        is_file: Whether it has an end and is not reconnected.
        seen: Frames decoded so far.
        size: (width, height) of the last frame; None before the first.

    Raises:
        MediaError: If there is no such file, it isn't a regular one, or the address's scheme isn't allowed.
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
        self.address = source_name(source)
        self.name = display_name(self.address)
        self.realtime, self.timeout, self.limits = realtime, timeout, limits
        scheme = scheme_of(self.address)
        self.is_file = format is None and not scheme and not _is_camera(self.address)
        self.format = format or ("v4l2" if not self.is_file and not scheme else None)
        self.seen = 0
        self.size: tuple[int, int] | None = None
        self._is_due, self._deliver = is_due, deliver
        self._created = time.monotonic()
        if self.is_file:
            check_regular(self.address)
            self.options = dict(options or {})
        else:
            # With a format of the app's choice, what it opens is the app's choice, too.
            allowed = address_options(self.address, limits) if format is None and scheme else {}
            defaults = {**LIVE_OPTIONS, **SCHEME_OPTIONS.get(scheme, {}), **allowed}
            self.options = {**defaults, **(options or {})}

    def read(self, closed: threading.Event, on_frame: Callable[[], None]) -> None:
        """Open the source and deliver its frames until it ends or `closed` is set.

        Args:
            closed: Ends the reading when set.
            on_frame: Called for every frame, due or not.

        Raises:
            MediaError: If the source can't be opened or is lost.
        """
        import av

        with self._open() as (container, stream):
            # Frame threading delays frames by as many as there are threads.
            stream.thread_type = "AUTO" if self.is_file else "SLICE"
            try:
                self._play(container, stream, closed, on_frame)
            except av.error.ExitError:
                raise MediaError(f"{self.name} was lost (nothing came for {self.timeout:g} s)") from None
            except av.error.FFmpegError as error:
                raise MediaError(f"{self.name} was lost ({reason(error)})") from None

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """Open the source. Yields the PyAV container and its video stream."""
        import av

        if self.is_file:
            budget = Budget(self.name, self.limits)
            with open_container(Path(self.address), budget, self.options) as opened:
                yield opened
            return
        try:
            container = av.open(
                self.address,
                format=self.format,
                options=dict(self.options),
                timeout=self.timeout,
                metadata_errors="replace",
            )
        except av.error.ExitError:
            raise MediaError(f"{self.name} can't be opened (no answer in {self.timeout:g} s)") from None
        except (av.error.FFmpegError, ValueError, OSError, MemoryError) as error:
            raise MediaError(f"{self.name} can't be opened ({self._why_not_open(error)})") from None
        with container:
            yield container, video_stream(container, self.name, self.limits)

    def _why_not_open(self, error: Exception) -> str:
        """FFmpeg says "Invalid argument" of formats that aren't on the list."""
        if getattr(error, "errno", None) == errno.EINVAL and "format_whitelist" in self.options:
            return "it isn't a format that is read from such an address; a playlist's must end in .m3u8"
        return reason(error)

    def _play(
        self, container: Any, stream: Any, closed: threading.Event, on_frame: Callable[[], None]
    ) -> None:
        began = last_frame = time.monotonic()
        first: float | None = None  # a file's first timestamp
        for frames in self._decode(container, stream):
            for frame in frames:
                last_frame = time.monotonic()
                self._count(frame)
                on_frame()
                if self.is_file:
                    seconds = self._file_time(frame)
                    first = seconds if first is None else first
                    seconds -= first
                    wait = began + seconds - last_frame
                    if self.realtime and closed.wait(min(max(wait, 0.0), threading.TIMEOUT_MAX)):
                        return
                else:
                    seconds = last_frame - self._created
                if self._is_due(seconds):
                    self._deliver(to_rgb(frame, self.name), seconds)
            if closed.is_set():
                return
            if not self.is_file and time.monotonic() - last_frame > self.timeout:
                raise MediaError(f"{self.name} delivered no frame for {self.timeout:g} s")

    def _decode(self, container: Any, stream: Any) -> Iterator[list[Any]]:
        """The frames of each packet; an empty list for one that can't be decoded, or isn't video."""
        import av

        errors = 0
        for packet in read_all_packets(container, stream):
            if packet is None:
                yield []
                continue
            try:
                frames = packet.decode()
                errors = 0
            except av.error.EOFError:
                return
            except av.error.FFmpegError as error:
                check_memory(error, self.name)
                frames = []
                errors += 1
                if errors > MAX_ERRORS:
                    raise MediaError(f"{self.name} can't be decoded any more ({reason(error)})") from None
            yield frames

    def _count(self, frame: Any) -> None:
        self.seen += 1
        if self.size != (frame.width, frame.height):
            check_size(frame.width, frame.height, self.name, self.limits)
            self.size = (frame.width, frame.height)

    def _file_time(self, frame: Any) -> float:
        if frame.pts is None or not frame.time_base:
            return self.seen / FALLBACK_FPS
        return float(frame.pts * frame.time_base)


def check_source_options(source: object, format: object, options: Any, color: str) -> None:
    """Refuse options of a live view that its source can't use, or would ignore.

    Raises:
        MediaError: Which one, and why.
    """
    if source is None and (format is not None or options):
        raise MediaError("format and options are for a source; this view's frames are pushed")
    if source is not None and color != "rgb":
        raise MediaError("color is for pushed frames; a source says it itself")
    texts = [text for pair in options.items() for text in pair] if isinstance(options, Mapping) else [None]
    if options is not None and not all(isinstance(text, str) for text in texts):
        raise MediaError("options must be strings by name, as in {'video_size': '1280x720'}")


def _is_camera(name: str) -> bool:
    """Whether a path is a V4L2 device (/dev/video0, or a link to one), which may be missing now."""
    return name.startswith("/dev/v4l/") or os.path.realpath(name).startswith("/dev/video")
