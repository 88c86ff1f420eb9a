"""From a source to features: choose frames, decode and encode them, record facts about them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.encoding.candidates import Candidates
from ppllava_edge.runtime.encoding.encoded_video import EncodedVideo
from ppllava_edge.runtime.encoding.frame_encoder import EngineLock, FrameEncoder, Progress
from ppllava_edge.runtime.media.arrays import ArrayReader
from ppllava_edge.runtime.media.isolation import open_source
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, MediaLimits
from ppllava_edge.runtime.media.readers import FrameReader
from ppllava_edge.runtime.media.thumbnails import read_pictures, small_picture
from ppllava_edge.runtime.pipeline.base import BasePipeline
from ppllava_edge.runtime.vision.frame_choice import choose_frames
from ppllava_edge.runtime.vision.frame_options import FrameOptions
from ppllava_edge.runtime.vision.preprocess import preprocess_image


def reader_of(
    source: str | os.PathLike[str] | Sequence[Any],
    options: FrameOptions,
    limits: MediaLimits = DEFAULT_LIMITS,
    isolate: bool = False,
) -> FrameReader:
    """A reader for a path, or for frames that the app passes. Raises MediaError."""
    if isinstance(source, (str, os.PathLike)):
        return open_source(source, limits, isolate)
    if options.frames is not None:
        raise MediaError(
            "frames and a sequence of images don't go together: all images that are given are used"
        )
    return ArrayReader(source)


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
        MediaError: If the source can't be decoded or doesn't suit the model; in one line.
    """
    m = pipeline.manifest
    if reader.kind == "image" and m.pooling.takes_images:
        return _encode_image(pipeline, engine_lock, reader)
    if options.select == "guided" and not m.pooling.guided:
        raise MediaError(
            f"--select guided needs pooling that the question guides; {m.name} pools with {m.pooling.method}"
        )
    given = isinstance(reader, ArrayReader)  # frames from the app are all used
    guided = options.select == "guided" and not given
    count = reader.count if given else options.count(m, reader)
    pipeline.check_frames(count)
    options.windows(m, count)  # refuses a token budget that can't be kept, before anything is decoded
    encoder = FrameEncoder(pipeline, engine_lock, reader, to_array=guided)
    encoder.run(partial(_choice, options=options, count=count, guided=guided), progress)
    video = _described(reader, encoder, count)
    # Fewer frames than asked for: a single picture, or a file whose header promises more than it holds.
    video.windows = options.windows(m, count if guided else len(reader.indices))
    started = time.perf_counter()
    with engine_lock:
        if not guided:
            video.features = encoder.clip.features(reader.indices)
        elif len(reader.indices) > count:
            video.candidates = Candidates(pipeline, encoder.states(reader.indices))
        else:  # a short clip has nothing to choose from
            video.indices = choose_frames(reader, count, options.start, options.end)
            video.times = [encoder.times[i] for i in video.indices]
            video.features = pipeline.branch(encoder.states(video.indices))
        pipeline.wait()
    video.vision = encoder.seconds + time.perf_counter() - started
    return video


def _choice(reader: FrameReader, options: FrameOptions, count: int, guided: bool) -> list[int]:
    """The numbers of the frames to encode: `count`, or the candidates that the question chooses among."""
    many = max(options.candidates, count) if guided else count
    chosen = choose_frames(reader, many, options.start, options.end)
    return list(dict.fromkeys(chosen)) if guided else chosen


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
    with engine_lock:
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
