"""Encoded videos in the feature cache: their keys, and the fields that are stored."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from ppllava_edge.engines.bundle.windows import Windows
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.runtime.encoding.candidates import Candidates
from ppllava_edge.runtime.encoding.encoded_video import EncodedVideo
from ppllava_edge.runtime.media.isolation import open_source
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, MediaLimits
from ppllava_edge.runtime.media.opening.paths import display_name
from ppllava_edge.runtime.media.thumbnails import read_pictures
from ppllava_edge.runtime.pipeline.base import BasePipeline
from ppllava_edge.runtime.vision.feature_cache import CachedVideo, FeatureCache, bundle_hash, content_hash
from ppllava_edge.runtime.vision.frame_options import FrameOptions
from ppllava_edge.runtime.vision.preprocess import count_tiles

log = logging.getLogger(__name__)
KEY_OF_OPTIONS = "Look"  # part of every entry's key: changing it would orphan users' cached entries
Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Seconds = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
MOST = 100_000  # frames of an entry, or tiles of an image
Many = msgspec.Meta(max_length=MOST)


class _Facts(msgspec.Struct, forbid_unknown_fields=True):
    """What is stored of an EncodedVideo beside its arrays; a file on disk, so every value has limits."""

    kind: Literal["video", "image"]
    media: Literal["video", "image"]
    indices: Annotated[list[Number], Many]
    times: Annotated[list[Seconds], Many]
    fps: Seconds
    duration: Seconds
    source_frames: Number
    count: Annotated[int, msgspec.Meta(ge=1, le=MOST)]
    image_size: tuple[Side, Side] | None
    notes: Annotated[list[Annotated[str, msgspec.Meta(max_length=2000)]], msgspec.Meta(max_length=100)]
    windows: Any


class CachedFeatures:
    """The cache entry of one source's encoded video.

    Args:
        cache: The feature cache; None: nothing is stored.
        pipeline: The model.
        source: A path; other sources aren't stored.
        options: How frames are chosen; another choice is another entry.
        limits: What reading the source again for pictures may cost.
        isolate: Read it in a child process.
    """

    def __init__(
        self,
        cache: FeatureCache | None,
        pipeline: BasePipeline,
        source: Any,
        options: FrameOptions,
        limits: MediaLimits = DEFAULT_LIMITS,
        isolate: bool = False,
    ):
        self.pipeline, self.source, self.limits, self.isolate = pipeline, source, limits, isolate
        is_path = isinstance(source, (str, os.PathLike)) and (
            os.path.isfile(source) or os.path.isdir(source)
        )  # the reader reports sources that are missing or not files
        self._cache = cache if is_path else None
        self._key: tuple[object, ...] = ()
        if self._cache is not None:
            made_by = repr(pipeline.engine.made_by if pipeline.engine else "")
            model = bundle_hash(pipeline.bundle), pipeline.engine_name, made_by
            choice = repr(options).replace(type(options).__name__, KEY_OF_OPTIONS, 1)
            self._key = content_hash(source), *model, choice

    def load(self) -> EncodedVideo | None:
        """The encoded video; None if it is missing, or was written by another version."""
        started = time.perf_counter()
        found = self._cache.load(*self._key) if self._cache is not None else None
        if found is None:
            return None
        try:
            facts = msgspec.convert(found.facts, _Facts)
            windows = Windows.from_json(facts.windows) if facts.windows else None
            _check_shapes(self.pipeline, facts, found.arrays)
            if facts.media == "video":
                _check_windows(self.pipeline, facts, windows)
        except (ValueError, KeyError, PPLLaVAError) as error:  # msgspec's errors are ValueErrors
            name = display_name(self.source)
            log.warning("the cached features of %s don't fit this version or model (%s)", name, error)
            return None
        video = EncodedVideo(**(msgspec.structs.asdict(facts) | {"windows": windows}))
        if "states" in found.arrays:
            video.candidates = Candidates(self.pipeline, found.arrays["states"], found.arrays["features"])
        else:
            video.features = found.arrays["features"]
        video.read_again = self._read_again
        log.info(
            "features of %s came from the cache in %.3f s",
            display_name(self.source),
            time.perf_counter() - started,
        )
        return video

    def _read_again(self, indices: Sequence[int]) -> dict[int, np.ndarray]:
        return read_pictures(open_source(self.source, self.limits, self.isolate), indices)

    def store(self, video: EncodedVideo) -> None:
        """Store an encoded video."""
        if self._cache is None:
            return
        if video.candidates is None:
            arrays = {"features": np.asarray(video.features)}
        else:
            arrays = {"states": video.candidates.states, "features": video.candidates.features}
        facts = {name: getattr(video, name) for name in _Facts.__struct_fields__}
        facts["windows"] = video.windows.as_json() if video.windows else None
        self._cache.store(CachedVideo(arrays, facts), *self._key)


def _check_windows(pipeline: BasePipeline, facts: _Facts, windows: Windows | None) -> None:
    """Check that the frames which a question sees can be pooled. Raises ValueError, PPLLaVAError."""
    m = pipeline.manifest
    frames = min(facts.count, len(facts.indices))
    pipeline.check_frames(frames)
    if windows is not None and not m.pooling.windowed:
        raise ValueError("windows for a model that pools without")
    if m.pooling.windowed:
        (windows or m.pooling.video).resolve((frames, *m.vision.grid))


def _check_shapes(pipeline: BasePipeline, facts: _Facts, arrays: dict[str, np.ndarray]) -> None:
    """Compare arrays with the model and the number of frames. Raises ValueError, KeyError."""
    vision = pipeline.manifest.vision
    features, states = arrays["features"], arrays.get("states")
    frames = len(facts.indices)
    if len(facts.times) != frames or not frames:
        raise ValueError(f"{len(facts.times)} times of {frames} frames")
    if features.shape[1:] != (vision.patches, vision.hidden_size) or features.dtype.kind != "f":
        raise ValueError(f"features are {features.dtype} {features.shape}")
    if facts.media == "video" and len(features) != frames:
        raise ValueError(f"features of {len(features)} frames for {frames}")
    if (facts.media == "image") != (facts.image_size is not None):
        raise ValueError("an image's size is missing")
    if facts.image_size is not None and len(features) != count_tiles(
        facts.image_size, pipeline.manifest.preprocessing
    ):
        raise ValueError(f"features of {len(features)} tiles for an image of {facts.image_size}")
    if states is not None:
        if facts.media != "video" or facts.count >= frames:
            raise ValueError(f"{facts.count} frames are to be chosen among {frames}")
        rows = vision.patches + vision.class_token
        if states.shape != (frames, vision.states, rows, vision.hidden_size) or states.dtype.kind != "f":
            raise ValueError(f"states are {states.dtype} {states.shape}")
