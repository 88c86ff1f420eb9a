"""The target that reads entries of the feature cache."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from ppllava_edge.bench.fuzz.targets.target import Target, expect
from ppllava_edge.runtime.encoding.cached_features import CachedFeatures
from ppllava_edge.runtime.pipeline.factory import Pipeline
from ppllava_edge.runtime.vision.feature_cache import FeatureCache
from ppllava_edge.runtime.vision.frame_options import FrameOptions

SIZE_BYTES = 8  # of the header's size


class OneEntry(FeatureCache):
    """A cache in which every video has the same entry.

    Args:
        entry: Its file.
    """

    def __init__(self, entry: Path):
        super().__init__(entry.parent)
        self.entry = entry

    def path(self, *key: object) -> Path:
        """The entry, whatever the key is."""
        return self.entry


def read_cache(path: Path, scratch: Path) -> None:
    """Load the encoded video of a file from an entry of the cache: a bad entry counts as missing."""
    entry = scratch / "cache" / "entry.features"
    entry.parent.mkdir(mode=0o700)
    entry.write_bytes(with_checksums(path.read_bytes()))
    pipeline = Pipeline.open(scratch.parent / "bundle", "cpu", 1, "standard")
    source = scratch.parent / "video.mp4"
    video = CachedFeatures(OneEntry(entry), pipeline, source, FrameOptions()).load()
    if video is not None:
        vision = pipeline.manifest.vision
        features = np.asarray(video.features if video.candidates is None else video.candidates.features)
        expect(features.shape[1:] == (vision.patches, vision.hidden_size), "features: of another shape")
        expect(len(video.times) == len(video.indices) >= 1, "times: not one per frame")
        expect(video.count >= 1, "count: below 1")


def with_checksums(entry: bytes) -> bytes:
    """An entry with the right checksums, as somebody who writes a hostile one would make it."""
    end = SIZE_BYTES + int.from_bytes(entry[:SIZE_BYTES], "little")
    try:
        header = json.loads(entry[SIZE_BYTES:end])
        metadata = header["__metadata__"]
        checksums = {"": zlib.crc32(metadata["facts"].encode())}
        for name, tensor in header.items():
            if name != "__metadata__":
                first, last = tensor["data_offsets"]
                checksums[name] = zlib.crc32(entry[end + first : end + last])
        metadata["checksums"] = json.dumps(checksums)
        changed = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return entry
    return len(changed).to_bytes(SIZE_BYTES, "little") + changed + entry[end:]


CACHE_TARGETS: tuple[Target, ...] = (Target("cache", read_cache, ".features", "safetensors"),)
