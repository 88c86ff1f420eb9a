"""Which sizes an engine is built for: a range for every symbolic dimension of a stage's inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from ppllava_edge.engines.bundle.engine_manifest import CAPACITY_STEP
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.bundle.windows import Triple, Windows

Range = tuple[int, int, int]  # least, best, most
Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # input → least, best, most
MAX_FRAMES = 64  # where no temporal adapter sets a limit
TRUNK_FRAMES = (1, 4, 8)
PREFILL = 1100


@dataclass(frozen=True)
class Limits:
    """frames: of a clip. prefill: usual length of a prompt. capacity: positions of the KV cache. decoder_profiles: 2, or 1 for both kinds of
    pass: TensorRT-RTX holds float16 and INT8 weights once per profile (docs/measurements.md)."""

    frames: Range
    question: int
    prefill: int
    capacity: int
    decoder_profiles: int = 2


def limits(
    m: Manifest, capacity: int | None = None, frames: int | None = None, decoder_profiles: int = 2
) -> Limits:
    """Those of a model: clips up to what its adapter knows, a cache for its usual prompt and answer."""
    v = m.vision
    most = v.max_frames or max(MAX_FRAMES, frames or 0)
    usual = min(frames or v.default_frames, most)
    capacity = min(capacity or usual_capacity(m), m.decoder.context)
    return Limits(
        (1, usual, most),
        m.question.length if m.question else 1,
        min(PREFILL, capacity),
        capacity,
        decoder_profiles,
    )


def usual_capacity(m: Manifest) -> int:
    """Visual tokens of the usual clip, a question, an answer of 128 tokens; rounded up to whole steps."""
    v, p = m.vision, m.pooling
    tokens = p.tokens(max(v.default_frames, p.video.min_frames() if p.windowed else 1), v.grid)
    return min(-(-(tokens + 64 + 128) // CAPACITY_STEP) * CAPACITY_STEP, m.decoder.context)


def profiles(stage: str, inputs: Iterable[onnx.ValueInfoProto], m: Manifest, size: Limits) -> list[Profile]:
    """One profile of a stage; of the decoder two: prefill, then one token at a time (or one for both). Inputs of fixed shape are left out."""
    inputs = list(inputs)
    if stage == "decoder":
        prefill, decode = (1, size.prefill, size.capacity), (1, 1, 1)
        room = size.capacity - 1
        if size.decoder_profiles == 1:
            whole: Range = (0, 0, room)
            return [_profile(inputs, {"s": prefill, "past": whole, "total": _sum(prefill, whole)})]
        past: list[Range] = [(0, 0, 0), (1, min(size.prefill, room), room)]  # of a cache that grows
        return [
            _profile(inputs, {"s": s, "past": before, "total": _sum(s, before)})
            for s, before in zip((prefill, decode), past)
        ]
    ranges: dict[str, Range] = {
        "b": TRUNK_FRAMES,
        "T": size.frames,
        "t": size.frames,
        "L": (1, min(32, size.question), size.question),
    }
    if stage == "pooling" and m.pooling.windowed:
        kinds, usual = (m.pooling.video, m.pooling.image), size.frames[1]
        least = min(w.min_frames() for w in kinds)  # a clip has at least one window
        ranges["t"] = least, max(least, usual), max(least, size.frames[2])
        found = _profile(inputs, ranges)
        if "kernel" in {
            v.name for v in inputs
        }:  # values, not shapes: those of videos and of images, of the shortest clip and of the longest
            windows = [_windows(w, m, frames) for w in kinds for frames in (usual, *ranges["t"])]
            for i, name in enumerate(("kernel", "stride")):
                values = [pair[i] for pair in windows]
                found[name] = tuple(map(min, *values)), values[0], tuple(map(max, *values))
        return [found]
    return [_profile(inputs, ranges)]


def _windows(w: Windows, m: Manifest, frames: int) -> tuple[Triple, Triple]:
    """Kernel and stride for a clip of so many frames (or of as many as fill a window)."""
    _, kernel, stride = w.resolve((max(frames, w.min_frames()), *m.vision.grid))
    return kernel, stride


def _sum(a: Range, b: Range) -> Range:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _profile(inputs: list[onnx.ValueInfoProto], ranges: dict[str, Range]) -> Profile:
    found: Profile = {}
    for value in inputs:
        dimensions = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        if all(isinstance(d, int) for d in dimensions):
            continue
        least, best, most = (
            tuple(d if isinstance(d, int) else ranges[d][i] for d in dimensions) for i in range(3)
        )
        found[value.name] = least, best, most
    return found
