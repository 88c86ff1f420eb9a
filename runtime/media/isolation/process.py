"""A decoding process as its parent sees it: messages, and what to say when it dies, hangs or lies."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.isolation.interpreter import start_python
from ppllava_edge.runtime.media.isolation.protocol import (
    MAX_HEADER,
    Channel,
    Disconnected,
    Message,
    ProtocolError,
    integer,
    text,
)
from ppllava_edge.runtime.media.limits import MediaLimits, check_size

POLL = 0.2  # seconds between looks at a process that is waited for
START_SECONDS = 60.0  # a cold start of the interpreter from a slow disk
GRACE = 3.0  # seconds beside decode_seconds, in which the process reports the timeout itself
STALL_SECONDS = 60.0  # without a message and without using the processor: the process hangs
LOOK_SECONDS = 2.0  # between looks at the processor time
END_SECONDS = 5.0  # for a process to end
MAX_TEXT = 500  # characters of an error or a note, beside the source's name
DEATHS: dict[int, str] = {
    signal.SIGKILL: "was killed (SIGKILL), probably because the machine ran out of memory",
    signal.SIGXCPU: "used more processor time than the limit decode_seconds allows",
}


class Interrupted(Exception):
    """The caller no longer waits for the process."""


class DecodingProcess:
    """A child process that decodes one source.

    Its methods raise MediaError if the process reports an error, died, hangs, or sent what can't be right.
    After any error it is gone. Used by one thread at a time.

    Args:
        module: The module whose `main` the child runs, see `start_python`.
        what: The source's name, for error messages.
        limits: decode_seconds bounds the time spent waiting for the process, sizes of frames are checked.
        variables: Environment variables to pass on.
        interrupted: Asked while waiting; True ends the waiting with Interrupted.

    Attributes:
        silence: Seconds to wait for a message; None: as long as the process uses the processor.

    Raises:
        EngineError: If there is no Python to run.
    """

    def __init__(
        self,
        module: str,
        what: str,
        limits: MediaLimits,
        variables: tuple[str, ...] = (),
        interrupted: Callable[[], bool] = lambda: False,
    ):
        self.silence: float | None = START_SECONDS
        self._what, self._limits, self._interrupted = what, limits, interrupted
        self._closed = False
        self._waited = 0.0  # seconds, by all calls that ended
        self._began = 0.0  # when the present call began to wait
        self._looked, self._used, self._last_used = 0.0, "", 0.0  # processor time: last look, last change
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise self._cannot_start(error) from None
        ours.settimeout(POLL)
        self._channel = Channel(ours, MAX_HEADER, self._watch)
        try:
            with theirs:
                self._process = start_python(module, theirs, variables)
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            ours.close()
            raise self._cannot_start(error) from None
        except BaseException:
            ours.close()
            raise
        self.receive("ready")
        self.silence = None
        self.restart_clock()

    def _cannot_start(self, error: Exception) -> MediaError:
        return MediaError(f"{self._what}: the decoding process can't be started ({error})")

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def restart_clock(self) -> None:
        """Count the time that decode_seconds bounds from zero: opening and reading have as much each."""
        self._waited = 0.0

    def send(self, message: Message) -> None:
        """Send a request."""
        with self._waiting():
            self._channel.send(message)

    def receive(self, *types: str) -> Message:
        """Wait for a message of one of these types."""
        with self._waiting():
            message = self._channel.receive()
            if message.get("type") == "error":
                raise MediaError(self.text(message.get("text")) or f"{self._what} can't be decoded")
            if message.get("type") not in types:
                raise ProtocolError("a message out of turn")
            return message

    def receive_image(self, message: Message) -> np.ndarray:
        """Wait for the pixels whose height and width a message gave. Returns RGB uint8 (H, W, 3)."""
        with self._waiting():
            height = integer(message, "height", 1, self._limits.max_side)
            width = integer(message, "width", 1, self._limits.max_side)
            check_size(width, height, self._what, self._limits)
            return self._channel.receive_image(height, width)

    def text(self, value: object) -> str:
        """Text that the process sent: one line of bounded length, without control characters."""
        return text(value, MAX_TEXT + 2 * len(self._what))

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Turn a ProtocolError, raised while a message's fields are read, into a MediaError."""
        try:
            yield
        except ProtocolError as error:
            self.close()
            raise MediaError(
                f"{self._what}: the decoding process sent what can't be right ({self.text(str(error))}); "
                "the file is damaged or hostile"
            ) from None

    def close(self) -> None:
        """End the process, whatever it is doing, and wait for its end. May be called again."""
        if not self._closed:
            self._closed = True
            self._channel.close()
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: reaped later
                self._process.wait(END_SECONDS)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Watch the time of a call, and end the process at any error."""
        self._began = self._last_used = time.monotonic()
        try:
            with self.checking():
                yield
        except Disconnected:
            reason = self._death()
            self.close()
            raise MediaError(f"{self._what}: the decoding process {reason}") from None
        except BaseException:
            self.close()
            raise
        finally:
            self._waited += time.monotonic() - self._began

    def _death(self) -> str:
        """Why the process disconnected, as the predicate of a sentence."""
        try:
            status = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if status >= 0:
            return f"ended too early (exit status {status})"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return DEATHS.get(-status) or f"crashed ({name}); the file is damaged or hostile"

    def _watch(self) -> None:
        """Called every POLL seconds at least while the process is waited for. Raises to end the waiting."""
        now = time.monotonic()
        if self._interrupted():
            raise Interrupted
        limit = self._limits.decode_seconds
        if limit is not None and self._waited + now - self._began > limit + GRACE:
            raise MediaError(f"{self._what} took longer to decode than {limit:g} s, the limit decode_seconds")
        if self.silence is not None:
            silent = now - self._began > self.silence
        else:
            silent = self._look(now) and now - self._last_used > STALL_SECONDS
        if silent:
            seconds = now - self._began
            raise MediaError(f"{self._what}: the decoding process hangs (no answer for {seconds:.0f} s)")

    def _look(self, now: float) -> bool:
        """Look at the processor time, now and then. Returns whether it was looked at, and can be."""
        if now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        try:
            # After the program's name in parentheses: the 12th and 13th fields, in clock ticks.
            used = str(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        except OSError:
            return False
        if used != self._used:
            self._used, self._last_used = used, now
        return True
