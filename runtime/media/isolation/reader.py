"""A reader whose source is opened and decoded by a child process."""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.isolation.process import DecodingProcess
from ppllava_edge.runtime.media.isolation.protocol import Message, ProtocolError, integer, number
from ppllava_edge.runtime.media.limits import MediaLimits
from ppllava_edge.runtime.media.opening.paths import display_name, source_name
from ppllava_edge.runtime.media.readers import Frame, FrameReader

WORKER = "ppllava_edge.runtime.media.isolation.worker"
MAX_FPS = 1e9
MAX_CHOICES = 4  # a reader chooses again twice at most
MAX_NOTES = 8


class IsolatedReader(FrameReader):
    """A file or a folder that a child process decodes, see worker.py. The frames are the same.

    The process ends when its frames were read, or with this reader. Reading again starts another one.

    Args:
        source: The path.
        limits: What the source may cost; memory is the process's.

    Raises:
        MediaError: If the source is unusable, or the process died; in one line.
        EngineError: If there is no Python to run the process.
    """

    def __init__(self, source: str | bytes | os.PathLike[str], limits: MediaLimits):
        self._source, self._limits = source_name(source), limits
        name = display_name(self._source)
        super().__init__(f"the folder {name}" if os.path.isdir(self._source) else name, 0, 1.0, 0.0)
        self._lock = threading.Lock()
        self._opened: DecodingProcess | None = self._open()
        self._end_unread = weakref.finalize(self, self._opened.close)

    def frames(self, choice: Callable[[FrameReader], Sequence[int]]) -> Iterator[Frame]:
        """See FrameReader.frames."""
        with self._lock:
            process, self._opened = self._opened, None
            self._end_unread.detach()
        process = process or self._open()
        try:
            yield from self._read(process, choice)
        finally:
            process.close()

    def close(self) -> None:
        """See FrameReader.close."""
        with self._lock:
            process, self._opened = self._opened, None
            self._end_unread.detach()
        if process is not None:
            process.close()

    def _open(self) -> DecodingProcess:
        """Start a process that opens the source, and take over the facts about it."""
        process = DecodingProcess(WORKER, self.what, self._limits)
        source = os.fsencode(self._source).hex()
        process.send({"source": source, "limits": dataclasses.asdict(self._limits)})
        opened = process.receive("opened")
        with process.checking():
            if opened.get("kind") not in ("video", "image"):
                raise ProtocolError("an unknown kind of source")
            self.kind = opened["kind"]
            self.takes_all = self.kind == "image"
            self._take_facts(opened)
        return process

    def _read(
        self, process: DecodingProcess, choice: Callable[[FrameReader], Sequence[int]]
    ) -> Iterator[Frame]:
        process.restart_clock()
        process.send({"type": "read"})
        choices, chosen, wanted = 0, list[int](), set[int]()
        while True:
            message = process.receive("choose", "frame", "done")
            if message["type"] == "choose":
                with process.checking():
                    self._take_facts(message)
                    choices += 1
                    if choices > MAX_CHOICES:
                        raise ProtocolError("too many requests to choose frames")
                self.indices = chosen = [int(i) for i in choice(self)]
                wanted = set(chosen)
                process.send({"numbers": chosen})
            elif message["type"] == "frame":
                with process.checking():
                    i = integer(message, "number", 0, self.count - 1)
                    if i not in wanted:
                        raise ProtocolError("a frame that wasn't asked for")
                    seconds = number(message, "seconds", 0)
                wanted.remove(i)
                yield Frame(i, process.receive_image(message), seconds)
            else:
                break
        with process.checking():
            self._take_facts(message)
            notes = message.get("notes")
            if not isinstance(notes, list) or len(notes) > MAX_NOTES:
                raise ProtocolError("notes that aren't a short list")
            self.notes = [process.text(note) for note in notes]
        self.indices = [i for i in chosen if i not in wanted]
        if not self.indices:
            raise MediaError(f"no frame of {self.what} could be decoded; the file is damaged")

    def _take_facts(self, message: Message) -> None:
        """Take over the number of frames, their rate and the duration."""
        most = 1 if self.kind == "image" else max(self._limits.max_packets, self._limits.max_files)
        self.count = integer(message, "count", 1, most)
        self.fps = number(message, "fps", 1e-9, MAX_FPS)
        self.duration = number(message, "duration", 0)
