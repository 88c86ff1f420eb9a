"""The caller's options for frames: how many, from when to when, chosen how, and how many visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.bundle.windows import Windows, within_budget
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.readers import FrameReader
from ppllava_edge.runtime.vision.frame_choice import MAX_FRAMES, frames_for_length

DEFAULT_CANDIDATES = 256
SELECTIONS = ("uniform", "guided")


@dataclass(frozen=True)
class FrameOptions:
    """Which frames of a source the model sees. The repr is part of the feature cache's key.

    Attributes:
        frames: How many; None: the model's default; "auto": more for longer videos.
        start: Seconds; None: the source's beginning.
        end: Seconds; None: the source's end.
        tokens: Maximum number of visual tokens; None: as many as the model's pooling windows give, and with
            frames="auto" as many as they give for the default number of frames.
        select: "uniform" (evenly spaced frames), or "guided": `candidates` frames are encoded, and the
            question chooses among them.
        candidates: How many frames guided selection encodes.

    Raises:
        MediaError: If a value is out of range.
    """

    frames: int | str | None = None
    start: float | None = None
    end: float | None = None
    tokens: int | None = None
    select: str = "uniform"
    candidates: int = DEFAULT_CANDIDATES

    def __post_init__(self) -> None:
        if self.frames not in (None, "auto") and not isinstance(self.frames, int | np.integer):
            raise MediaError(f"frames must be a number or auto, not {self.frames!r}")
        if self.select not in SELECTIONS:
            raise MediaError(f"select must be {' or '.join(SELECTIONS)}, not {self.select!r}")
        if not (isinstance(self.candidates, int | np.integer) and 1 <= self.candidates <= MAX_FRAMES):
            raise MediaError(f"candidates must be from 1 to {MAX_FRAMES}, not {self.candidates!r}")
        if self.tokens is not None and not (isinstance(self.tokens, int | np.integer) and self.tokens >= 1):
            raise MediaError(f"tokens must be 1 or more, not {self.tokens!r}")
        for name, seconds in (("start", self.start), ("end", self.end)):
            if seconds is not None and not isinstance(seconds, int | float | np.number):
                raise MediaError(f"{name} must be a number of seconds, not {seconds!r}")

    def count(self, m: Manifest, reader: FrameReader) -> int:
        """Decide how many frames of a source the model sees.

        Raises:
            MediaError: If there are more frames than its temporal adapter supports, or fewer than a pooling
                window has.
        """
        if self.frames == "auto":
            return self._auto_count(m, reader.duration)
        count = m.vision.default_frames if self.frames is None else int(self.frames)
        check_clip_length(m, count)
        if 0 < count < m.pooling.min_frames:
            least = m.pooling.min_frames
            raise MediaError(
                f"frames={count} is too few: a pooling window has {least} frames; use frames={least} or more"
            )
        return count

    def _auto_count(self, m: Manifest, duration: float) -> int:
        """How many frames frames="auto" takes of a source of this duration in seconds."""
        start = self.start or 0.0
        end = duration if self.end is None else min(self.end, duration)
        windowed = m.pooling.windowed and m.pooling.video.kernel
        step = m.pooling.video.min_frames() if windowed else 1
        return frames_for_length(max(end - start, 0.0), m.vision.default_frames, m.vision.max_frames, step)

    def windows(self, m: Manifest, frames: int) -> Windows | None:
        """Choose pooling windows that keep within the token budget.

        Args:
            m: The model.
            frames: How many frames it sees.

        Returns:
            The windows; None: the model's own.

        Raises:
            MediaError: If `tokens` is set and the model pools without windows.
        """
        if self.tokens is None and self.frames != "auto":
            return None
        if not m.pooling.windowed:
            if self.tokens is None:
                return None
            raise MediaError(f"tokens needs windowed pooling; {m.name} pools with {m.pooling.method}")
        tokens = self.tokens
        if tokens is None:
            shape = m.pooling.video.resolve((m.vision.default_frames, *m.vision.grid))[0]
            tokens = shape[0] * shape[1] * shape[2]
        return within_budget(m.pooling.video, (frames, *m.vision.grid), tokens)


def check_clip_length(manifest: Manifest, frames: int) -> None:
    """Refuse clips of more frames than the model's temporal adapter supports.

    Raises:
        MediaError: If there are too many frames.
    """
    limit = manifest.vision.max_frames
    if limit is not None and frames > limit:
        raise MediaError(
            f"{frames} frames are too many: the temporal adapter of {manifest.name} knows at most {limit}; "
            f"use frames={limit} or fewer"
        )
