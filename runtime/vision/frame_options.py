"""What the model is to see of a source: how many frames, from when to when, chosen how."""

from __future__ import annotations

from dataclasses import dataclass

from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.bundle.windows import Windows, within_budget
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.readers import FrameReader
from ppllava_edge.runtime.vision.frame_choice import MAX_FRAMES, frames_for_length

DEFAULT_CANDIDATES = 256
SELECTIONS = ("uniform", "guided")


@dataclass(frozen=True)
class FrameOptions:
    """frames: how many the model sees; None: its default; "auto": more for longer videos. start, end: seconds. tokens: most visual tokens, None:
    what the model's windows give (with "auto": as many as its default frames give). select: "uniform", or "guided": the question picks the frames out of
    `candidates` that are encoded.
    """

    frames: int | str | None = None
    start: float | None = None
    end: float | None = None
    tokens: int | None = None
    select: str = "uniform"
    candidates: int = DEFAULT_CANDIDATES

    def __post_init__(self) -> None:
        if isinstance(self.frames, str) and self.frames != "auto":
            raise MediaError(f"--frames must be a number or auto, not {self.frames!r}")
        if self.select not in SELECTIONS:
            raise MediaError(f"--select must be {' or '.join(SELECTIONS)}, not {self.select!r}")
        if not 1 <= self.candidates <= MAX_FRAMES:
            raise MediaError(f"--candidates must be from 1 to {MAX_FRAMES}, not {self.candidates}")
        if self.tokens is not None and self.tokens < 1:
            raise MediaError(f"--tokens must be 1 or more, not {self.tokens}")

    def count(self, m: Manifest, reader: FrameReader) -> int:
        """How many frames the model sees of this source. Raises MediaError for more than its temporal adapter knows."""
        if self.frames == "auto":
            start, end = (
                self.start or 0.0,
                reader.duration if self.end is None else min(self.end, reader.duration),
            )
            step = m.pooling.video.min_frames() if m.pooling.windowed and m.pooling.video.kernel else 1
            return frames_for_length(
                max(end - start, 0.0), m.vision.default_frames, m.vision.max_frames, step
            )
        count = m.vision.default_frames if self.frames is None else int(self.frames)
        check_clip_length(m, count)
        return count

    def windows(self, m: Manifest, frames: int) -> Windows | None:
        """Pooling windows that keep within the token budget; None: the model's own."""
        tokens = self.tokens
        if tokens is None and self.frames != "auto":
            return None
        if not m.pooling.windowed:
            if self.tokens is None:
                return None
            raise MediaError(f"--tokens needs windowed pooling; {m.name} pools with {m.pooling.method}")
        if tokens is None:
            output = m.pooling.video.resolve((m.vision.default_frames, *m.vision.grid))[0]
            tokens = output[0] * output[1] * output[2]
        return within_budget(m.pooling.video, (frames, *m.vision.grid), tokens)


def check_clip_length(manifest: Manifest, frames: int) -> None:
    """Raise MediaError if a clip of `frames` frames is longer than the model's temporal adapter knows."""
    limit = manifest.vision.max_frames
    if limit is not None and frames > limit:
        raise MediaError(
            f"{frames} frames are too many: the temporal adapter of {manifest.name} knows at most {limit}; "
            f"use --frames {limit} or fewer"
        )
