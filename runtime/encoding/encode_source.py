"""From a source to features: choose frames, decode and encode them, record facts about them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.encoding.candidates import Candidates
from ppllava_edge.runtime.encoding.encoded_video import EncodedVideo
from ppllava_edge.runtime.encoding.frame_encoder import EngineLock, FrameEncoder, Progress
from ppllava_edge.runtime.media.arrays import ArrayReader
from ppllava_edge.runtime.media.isolation import open_source
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, MediaLimits
from ppllava_edge.runtime.media.opening.paths import source_name
from ppllava_edge.runtime.media.readers import FrameReader
from ppllava_edge.runtime.media.thumbnails import read_pictures, small_picture
from ppllava_edge.runtime.pipeline.base import BasePipeline
from ppllava_edge.runtime.vision.frame_choice import MAX_FRAMES, choose_frames, sample_indices
from ppllava_edge.runtime.vision.frame_options import FrameOptions
from ppllava_edge.runtime.vision.preprocess import preprocess_image


def checked_source(source: Any, times: object, fps: object, color: object) -> Any:
    """A source as the app gives it; bytes as str.

    Raises:
        MediaError: If it is a path, and `times`, `fps` or `color` are given, which are for frames in memory.
    """
    if not isinstance(source, (str, bytes, os.PathLike)):
        return source
    if times is not None or fps is not None or color != "rgb":
        raise MediaError("times, fps and color are for frames in memory; a file says them itself")
    return source_name(source)


def reader_of(
    source: str | os.PathLike[str] | Sequence[Any],
    options: FrameOptions,
    limits: MediaLimits = DEFAULT_LIMITS,
    isolate: bool = False,
    times: Sequence[float] | None = None,
    fps: float | None = None,
    color: str = "rgb",
) -> FrameReader:
    """A reader for a path, or for frames that the app passes.

    Args:
        source: A path, or frames.
        options: `start` and `end` choose among frames.
        limits: What the source may cost.
        isolate: Open and decode a path in a child process.
        times: When each frame was taken; see ArrayReader.
        fps: Frames per second, instead of times.
        color: The order of the frames' channels.

    Raises:
        MediaError: If the source is unusable; in one line.
    """
    if not isinstance(source, (str, os.PathLike)):
        return ArrayReader(source, times, fps, color, options.start, options.end, limits)
    return open_source(source, limits, isolate)


def encode_source(
    pipeline: BasePipeline,
    engine_lock: EngineLock,
    reader: FrameReader,
    options: FrameOptions,
    progress: Progress | None = None,
) -> EncodedVideo:
    """Choose, decode and encode the frames of a source.

    Args:
        pipeline: The model.
        engine_lock: Held while the engine encodes a batch of frames.
        reader: The source.
        options: How many frames, which, and how many visual tokens.
        progress: Called with ("decode" or "vision", frames done, frames in all).

    Returns:
        Features, or encoded candidates if the question is to choose among them.

    Raises:
        MediaError: If the source can't be decoded or doesn't suit the model; in one line. The reader is
            closed then: an error that the app keeps must not keep a decoding process.
    """
    try:
        return _encode(pipeline, engine_lock, reader, options, progress)
    except BaseException:
        reader.close()
        raise


def _encode(
    pipeline: BasePipeline,
    engine_lock: EngineLock,
    reader: FrameReader,
    options: FrameOptions,
    progress: Progress | None,
) -> EncodedVideo:
    """encode_source, which closes the reader if this fails."""
    m = pipeline.manifest
    if reader.kind == "image" and m.pooling.takes_images:
        return _encode_image(pipeline, engine_lock, reader)
    if options.select == "guided" and not m.pooling.guided:
        raise MediaError(
            f"select=guided needs pooling that the question guides; {m.name} pools with {m.pooling.method}"
        )
    guided = options.select == "guided"
    count = _count(pipeline, reader, options)
    pipeline.check_frames(count)
    options.windows(m, count)  # refuses a token budget that can't be kept, before anything is decoded
    encoder = FrameEncoder(pipeline, engine_lock, reader, to_array=guided)
    encoder.run(partial(_choice, options=options, count=count, guided=guided), progress)
    video = _described(reader, encoder, count)
    # Fewer frames than asked for: a single picture, or a file whose header promises more than it holds.
    video.windows = options.windows(m, count if guided else len(reader.indices))
    started = time.perf_counter()
    with engine_lock.hold():
        if not guided:
            video.features = encoder.clip.features(reader.indices)
        elif len(reader.indices) > count:
            video.candidates = Candidates(pipeline, encoder.states(reader.indices))
        else:  # a short clip has nothing to choose from
            video.indices = _chosen(reader, count, options)
            video.times = [encoder.times[i] for i in video.indices]
            video.features = pipeline.branch(encoder.states(video.indices))
        pipeline.wait()
    video.vision = encoder.seconds + time.perf_counter() - started
    return video


def _choice(reader: FrameReader, options: FrameOptions, count: int, guided: bool) -> list[int]:
    """The numbers of the frames to encode: `count`, or the candidates that the question chooses among."""
    many = max(options.candidates, count) if guided else count
    chosen = _chosen(reader, many, options)
    return list(dict.fromkeys(chosen)) if guided else chosen


def _count(pipeline: BasePipeline, reader: FrameReader, options: FrameOptions) -> int:
    """How many frames the model sees. Of frames from the app: all, unless the options say otherwise.

    Too few for a pooling window are repeated.
    """
    if not isinstance(reader, ArrayReader):
        return options.count(pipeline.manifest, reader)
    if options.frames is None and options.select == "uniform":
        return max(len(reader.selected), pipeline.manifest.pooling.min_frames)
    return replace(options, start=None, end=reader.selected_seconds).count(pipeline.manifest, reader)


def _chosen(reader: FrameReader, frames: int, options: FrameOptions) -> list[int]:
    """Numbers of so many frames, evenly spaced from start to end."""
    if not isinstance(reader, ArrayReader):
        return choose_frames(reader, frames, options.start, options.end)
    if frames == len(reader.selected):
        return list(reader.selected)
    if not 1 <= frames <= MAX_FRAMES:
        raise MediaError(f"frames must be from 1 to {MAX_FRAMES}, not {frames}")
    return [reader.selected[i] for i in sample_indices(len(reader.selected), 1.0, frames)]


def _described(reader: FrameReader, encoder: FrameEncoder, count: int) -> EncodedVideo:
    """The encoded video without its features."""
    return EncodedVideo(
        kind="video",
        media="video",
        indices=list(reader.indices),
        times=[encoder.times[i] for i in reader.indices],
        fps=reader.fps,
        duration=reader.duration,
        source_frames=reader.count,
        count=count,
        notes=list(reader.notes),
        pictures=encoder.pictures,
        read_again=partial(read_pictures, reader),
    )


def _encode_image(pipeline: BasePipeline, engine_lock: EngineLock, reader: FrameReader) -> EncodedVideo:
    """A single image, as a view of the whole and a grid of crops."""
    (frame,) = reader.frames(lambda r: [0])
    started = time.perf_counter()
    tiles = preprocess_image(frame.image, pipeline.manifest.preprocessing)
    pipeline.load("encoding")
    with engine_lock.hold():
        features = pipeline.encode_frames(tiles, media="image")
        pipeline.wait()
    return EncodedVideo(
        kind="image",
        media="image",
        indices=[0],
        times=[0.0],
        fps=1.0,
        duration=0.0,
        source_frames=1,
        count=1,
        features=features,
        image_size=(frame.image.shape[0], frame.image.shape[1]),
        notes=list(reader.notes),
        pictures={0: small_picture(frame.image)},
        read_again=partial(read_pictures, reader),
        vision=time.perf_counter() - started,
    )
