"""What is looked at: which frames of a source, how many, and how they become features.

Decoding and preparing frames goes on in a thread of its own, a few frames ahead of the engine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.errors import MediaError
from ..engines.plugins.prepare_frame.kernel import is_device_frame
from ..engines.pooling import Windows, within_budget
from .container import check_size
from .frames import frames_for_length
from .prefetch import ahead
from .preprocess import preprocess_image, preprocess_video
from .selection import Candidates, array_for
from .video import MOST_FRAMES, Frame, FrameReader, open_reader

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .scheduling import Turns

Progress = Callable[[str, int, int], None]  # what ("decode" or "vision"), done, of how many

BATCH = 4  # frames encoded at once
DEFAULT_CANDIDATES = 256
PICTURE_SIDE = 448  # pixels; frames are kept this large, for people to look at
MOST_PICTURES = 64  # kept; of longer clips they are read again when somebody wants to see them
SELECTIONS = ("uniform", "guided")


@dataclass(frozen=True)
class Look:
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
        if not 1 <= self.candidates <= MOST_FRAMES:
            raise MediaError(f"--candidates must be from 1 to {MOST_FRAMES}, not {self.candidates}")
        if self.tokens is not None and self.tokens < 1:
            raise MediaError(f"--tokens must be 1 or more, not {self.tokens}")

    def count(self, pipeline: Pipeline, reader: FrameReader) -> int:
        """How many frames the model sees of this source. Raises MediaError for more than its temporal adapter knows."""
        m = pipeline.manifest
        if self.frames == "auto":
            start, end = self.start or 0.0, reader.duration if self.end is None else min(self.end, reader.duration)
            step = m.pooling.video.least_frames() if m.pooling.windowed and m.pooling.video.kernel else 1
            return frames_for_length(max(end - start, 0.0), m.vision.default_frames, m.vision.max_frames, step)
        count = m.vision.default_frames if self.frames is None else int(self.frames)
        pipeline.check_frames(count)
        return count

    def windows(self, pipeline: Pipeline, frames: int) -> Windows | None:
        """Pooling windows that keep within the token budget; None: the model's own."""
        m, tokens = pipeline.manifest, self.tokens
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


@dataclass
class Looked:
    """A source that was looked at. features (T,P,C), or candidates to choose them from. indices, times (seconds): of the T frames, or of the candidates.

    count: frames the model sees; windows: pooling windows, None for the model's. pictures: small RGB uint8 frames by index, as far as they are kept.
    read_again: gives pictures that aren't. vision: seconds of encoding; video_decode: of waiting for frames (VideoQA.open fills it in).
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

    def pictures_of(self, indices: Sequence[int]) -> list[np.ndarray]:
        """RGB uint8 (H,W,3) of these frames, at most 448 pixels a side; read again if they weren't kept. Raises MediaError if they can't be."""
        missing = [i for i in dict.fromkeys(indices) if i not in self.pictures]
        read = self.read_again(missing) if missing and self.read_again is not None else {}
        known = self.pictures | read
        return [known[i] for i in indices if i in known]


class GivenFrames(FrameReader):
    """Frames that the app has already; all are used."""

    def __init__(self, images: Sequence[Any]):
        self.images = [rgb_frame(image, f"frame {i}") for i, image in enumerate(images)]
        if not self.images:
            raise MediaError("there are no frames")
        super().__init__("the frames", len(self.images), 1.0, float(len(self.images)))

    def choose(self, frames: int, start: float | None = None, end: float | None = None) -> list[int]:
        """All of them."""
        return list(range(self.count))

    def frames(self, choice: Callable[[FrameReader], Sequence[int]]) -> Iterator[Frame]:
        """As FrameReader says."""
        self.indices = list(choice(self))
        return (Frame(i, self.images[i], float(i)) for i in sorted(set(self.indices)))


def rgb_frame(image: Any, what: str) -> np.ndarray:
    """A frame from the app as RGB uint8 (H,W,3): numpy, or anything that exports DLPack from host memory. Raises MediaError."""
    if is_device_frame(image):
        raise MediaError(f"{what} lies in GPU memory; engines on the CPU, and VideoQA.open, take frames in host memory")
    if not isinstance(image, np.ndarray) and hasattr(image, "__dlpack__"):
        try:
            image = np.from_dlpack(image)
        except (RuntimeError, TypeError, ValueError, BufferError) as error:
            raise MediaError(f"{what} can't be taken through DLPack: {str(error).splitlines()[0]}") from None
    array: np.ndarray = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise MediaError(f"{what} must be RGB uint8 (height, width, 3), not {array.dtype} {array.shape}")
    check_size(array.shape[1], array.shape[0], what)
    return array


def reader_of(source: str | os.PathLike[str] | Sequence[np.ndarray], look: Look) -> FrameReader:
    """A reader for a path, or for frames that the app gives. Raises MediaError."""
    if isinstance(source, (str, os.PathLike)):
        return open_reader(source)
    if look.frames is not None:
        raise MediaError("frames and a sequence of images don't go together: all images that are given are used")
    return GivenFrames(source)


def look_at(pipeline: Pipeline, turns: Turns, reader: FrameReader, look: Look, progress: Progress | None = None) -> Looked:
    """Decode and encode what is looked at. Raises MediaError in one line."""
    m = pipeline.manifest
    media = "video" if reader.kind == "video" or m.pooling.method.startswith("pllava") else "image"
    if media == "image":
        return _look_at_image(pipeline, turns, reader)
    count = reader.count if isinstance(reader, GivenFrames) else look.count(pipeline, reader)
    pipeline.check_frames(count)
    windows = look.windows(pipeline, count)
    if look.select == "guided" and not m.pooling.guided:
        raise MediaError(f"--select guided needs pooling that the question guides; {m.name} pools with {m.pooling.method}")
    guided = look.select == "guided" and not isinstance(reader, GivenFrames)
    many = max(look.candidates, count) if guided else count

    def choice(r: FrameReader) -> list[int]:
        chosen = r.choose(many, look.start, look.end)
        return list(dict.fromkeys(chosen)) if guided else chosen

    encoded = _encode(pipeline, turns, reader, choice, guided, progress)
    if not guided and len(reader.indices) != count:  # a single picture, a file of which fewer frames could be decoded
        windows = look.windows(pipeline, len(reader.indices))
    looked = Looked("video", media, list(reader.indices), [encoded.times[i] for i in reader.indices], reader.fps, reader.duration, reader.count, count,
                    windows=windows, notes=list(reader.notes), pictures=encoded.pictures, read_again=partial(read_pictures, reader))  # fmt: skip
    encoding = time.perf_counter()
    with turns:
        if not guided:
            looked.features = encoded.clip.features(reader.indices)
        elif len(reader.indices) > count:
            looked.candidates = Candidates(pipeline, encoded.stored(reader.indices))
        else:  # a short clip has nothing to choose from
            looked.indices = reader.choose(count, look.start, look.end)
            looked.times = [encoded.times[i] for i in looked.indices]
            looked.features = pipeline.branch(encoded.stored(looked.indices))
        pipeline.wait()
    looked.vision = encoded.seconds + time.perf_counter() - encoding
    return looked


class _Encoded:
    """Frames on their way: states by index, when each is shown, small pictures, seconds spent encoding them."""

    def __init__(self, pipeline: Pipeline):
        self.clip, self.times, self.pictures = pipeline.clip(), dict[int, float](), dict[int, np.ndarray]()
        self.seconds = 0.0
        self.array: np.ndarray | None = None
        self.rows: dict[int, int] = {}

    def store(self, capacity: int) -> None:
        """Move states to one array, mapped from a file if it is large."""
        for index, state in self.clip.states.items():
            state = np.asarray(state)
            row = self.rows.setdefault(index, len(self.rows))
            if self.array is None or row >= len(self.array):  # a second time only if a damaged file was chosen from again
                larger = array_for((capacity + row, *state.shape[1:]), state.dtype)
                if self.array is not None:
                    larger[: len(self.array)] = self.array
                self.array = larger
            self.array[row] = state[0]
        self.clip.states.clear()

    def stored(self, indices: Sequence[int]) -> np.ndarray:
        """(n,S,P+1,C) of these frames."""
        assert self.array is not None
        rows = [self.rows[i] for i in indices]
        return self.array[: len(rows)] if rows == list(range(len(rows))) else self.array[rows]


def _encode(
    pipeline: Pipeline, turns: Turns, reader: FrameReader, choice: Callable[[FrameReader], list[int]], to_store: bool, progress: Progress | None
) -> _Encoded:
    encoded, preprocessing = _Encoded(pipeline), pipeline.manifest.preprocessing

    def prepared() -> Iterator[tuple[int, float, np.ndarray]]:
        for frame in reader.frames(choice):
            if len(encoded.pictures) < MOST_PICTURES:
                encoded.pictures[frame.number] = small_picture(frame.image)
            yield frame.number, frame.seconds, preprocess_video([frame.image], preprocessing)[0]

    frames, batch, done, more = ahead(prepared(), 2 * BATCH), list[tuple[int, np.ndarray]](), 0, True
    try:
        while more:
            item = next(frames, None)
            if item is None:
                more = False
            else:
                index, seconds, pixels = item
                encoded.times[index] = seconds
                batch.append((index, pixels))
            wanted = len(set(reader.indices))
            if batch and (len(batch) == BATCH or not more):
                started = time.perf_counter()
                with turns:
                    encoded.clip.add(np.stack([pixels for _, pixels in batch]), [i for i, _ in batch], more=more and done + len(batch) < wanted)
                if to_store:
                    encoded.store(wanted)
                done += len(batch)
                batch.clear()
                encoded.seconds += time.perf_counter() - started
            if progress:
                progress("decode", min(len(encoded.times), wanted), wanted)
                progress("vision", min(done, wanted), wanted)
    finally:
        frames.close()
    return encoded


def _look_at_image(pipeline: Pipeline, turns: Turns, reader: FrameReader) -> Looked:
    (frame,) = reader.frames(lambda r: [0])
    decoded = time.perf_counter()
    tiles = preprocess_image(frame.image, pipeline.manifest.preprocessing)
    with turns:
        features = pipeline.encode_frames(tiles, media="image")
        pipeline.wait()
    return Looked("image", "image", [0], [0.0], 1.0, 0.0, 1, 1, features, image_size=(frame.image.shape[0], frame.image.shape[1]), notes=list(reader.notes),
                  pictures={0: small_picture(frame.image)}, read_again=partial(read_pictures, reader),
                  vision=time.perf_counter() - decoded)  # fmt: skip


def read_pictures(reader: FrameReader, indices: Sequence[int]) -> dict[int, np.ndarray]:
    """Small pictures of these frames, by index."""
    return {frame.number: small_picture(frame.image) for frame in reader.frames(lambda r: sorted(indices))}


def small_picture(image: np.ndarray) -> np.ndarray:
    """An image of at most 448 pixels a side, to be looked at by people."""
    from PIL import Image

    longest = max(image.shape[:2])
    if longest <= PICTURE_SIDE:
        return np.array(image)
    size = (max(1, round(image.shape[1] * PICTURE_SIDE / longest)), max(1, round(image.shape[0] * PICTURE_SIDE / longest)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))
