"""Decoding in a child process: its crash, its memory or its silence is a MediaError in the parent.

`reader.IsolatedReader` runs in the parent, `worker` in the child; both speak the messages of `protocol` over
a socket. The child isn't trusted: a hostile file may have taken it over.
"""

from __future__ import annotations

import os

from ppllava_edge.runtime.media.limits import MediaLimits
from ppllava_edge.runtime.media.readers import FrameReader, open_reader


def open_source(
    source: str | bytes | os.PathLike[str], limits: MediaLimits, isolate: bool = False
) -> FrameReader:
    """Open a file or a folder in this process, or (isolate) in one of its own.

    Raises:
        MediaError: If the source is unusable; in one line.
        EngineError: If there is no Python to run the process.
    """
    if not isolate:
        return open_reader(source, limits)
    from ppllava_edge.runtime.media.isolation.reader import IsolatedReader  # most apps start no process

    return IsolatedReader(source, limits)
