"""A source after decoding and encoding: features, and facts about its frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ppllava_edge.engines.bundle.windows import Windows
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.encoding.candidates import Candidates
from ppllava_edge.runtime.media.readers import Frames


@dataclass
class EncodedVideo:
    """The result of encoding a source.

    Attributes:
        kind: The source's kind, "video" or "image".
        media: How it is pooled, "video" or "image".
        indices: Numbers of the T frames, or of the candidates.
        times: When each frame is shown, seconds.
        fps, duration, source_frames: The source's frame rate, duration in seconds, and number of frames.
        count: Frames that the model sees.
        features: (T, P, C); None if the question is to choose among the candidates.
        candidates: Encoded frames to choose from; None: all are used.
        windows: Pooling windows; None: the model's.
        image_size: (height, width) of an image.
        notes: Notes for the user.
        pictures: Small RGB uint8 frames by number, for the frames that were kept.
        read_again: Reads pictures that weren't kept.
        video_decode, vision: Seconds of waiting for frames, and of encoding them.
    """

    kind: str
    media: str
    indices: list[int]
    times: list[float]
    fps: float
    duration: float
    source_frames: int
    count: int
    features: Any = None
    candidates: Candidates | None = None
    windows: Windows | None = None
    image_size: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)
    pictures: dict[int, np.ndarray] = field(default_factory=dict)
    read_again: Callable[[Sequence[int]], dict[int, np.ndarray]] | None = None
    video_decode: float = 0.0
    vision: float = 0.0

    def arrays(self) -> list[Any]:
        """The arrays that it holds: features, or candidates, and the small pictures that were kept."""
        candidates = self.candidates
        arrays = [self.features, *([candidates.states, candidates.features] if candidates else [])]
        return [array for array in (*arrays, *self.pictures.values()) if array is not None]

    def pictures_of(self, indices: Sequence[int]) -> list[np.ndarray]:
        """RGB uint8 (H, W, 3) of these frames, at most 448 pixels a side; read again if they weren't kept.

        Raises:
            MediaError: If the source has no such frame, or they can't be read again.
        """
        for i in indices:
            if not (isinstance(i, int | np.integer) and 0 <= i < self.source_frames):
                raise MediaError(
                    f"there is no frame {i!r}; frames have the numbers 0 to {self.source_frames - 1}"
                )
        missing = [i for i in dict.fromkeys(indices) if i not in self.pictures]
        read = self.read_again(missing) if missing and self.read_again is not None else {}
        known = self.pictures | read
        return [known[i] for i in indices if i in known]

    def frames(self) -> Frames:
        """The frames, with the small pictures that were kept."""
        return Frames(
            images=[self.pictures[i] for i in self.indices if i in self.pictures],
            indices=list(self.indices),
            times=list(self.times),
            count=self.source_frames,
            fps=self.fps,
            duration=self.duration,
            kind=self.kind,
            notes=list(self.notes),
        )

    def view(self, q: Any, window: int) -> tuple[Any, list[int], list[float]]:
        """The frames that a question is answered from.

        Args:
            q: (1, E), the encoded question; it chooses if there are candidates.
            window: Frames of a pooling window.

        Returns:
            Features (T, P, C), frame numbers, times in seconds.
        """
        if self.candidates is None:
            return self.features, self.indices, self.times
        features, chosen = self.candidates.choose(q, self.count, window)
        return features, [self.indices[i] for i in chosen], [self.times[i] for i in chosen]
