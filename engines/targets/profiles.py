"""Optimisation profiles: the range of every symbolic dimension for which a TensorRT engine is built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from ppllava_edge.engines.bundle.engine_manifest import CAPACITY_STEP
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.bundle.windows import Triple, Windows

Range = tuple[int, int, int]  # min, opt, max
Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # input → min, opt, max shape
MAX_FRAMES = 64  # where no temporal adapter sets a limit
TRUNK_FRAMES = (1, 4, 8)
PREFILL = 1100
QUESTION = 32
SHORT_TEXT = 64  # tokens: the prompt without visual tokens
ANSWER = 128  # tokens


@dataclass(frozen=True)
class Limits:
    """The sizes for which a bundle's engines are built.

    Attributes:
        frames: Frames of a clip.
        question: Maximum number of tokens of a question in the question tower.
        prefill: The usual length of a prompt in tokens.
        capacity: Positions of the KV cache.
        decoder_profiles: 2 (prefill, one token) or 1 for both: TensorRT-RTX keeps float16 and INT8 weights
            once per profile (docs/measurements.md).
    """

    frames: Range
    question: int
    prefill: int
    capacity: int
    decoder_profiles: int = 2


def limits(
    m: Manifest, capacity: int | None = None, frames: int | None = None, decoder_profiles: int = 2
) -> Limits:
    """The sizes for a model.

    Args:
        m: The bundle's manifest.
        capacity: Positions of the KV cache; None: enough for the usual clip, a question and an answer.
        frames: Frames of the usual clip; None: the model's default.
        decoder_profiles: 2 or 1.
    """
    v = m.vision
    max_frames = v.max_frames or max(MAX_FRAMES, frames or 0)
    usual_frames = min(frames or v.default_frames, max_frames)
    capacity = min(capacity or usual_capacity(m), m.decoder.context)
    return Limits(
        (1, usual_frames, max_frames),
        m.question.length if m.question else 1,
        min(PREFILL, capacity),
        capacity,
        decoder_profiles,
    )


def usual_capacity(m: Manifest) -> int:
    """KV cache positions for the usual clip, a question and an answer, rounded up to whole steps."""
    v, p = m.vision, m.pooling
    visual = p.tokens(max(v.default_frames, p.min_frames), v.grid)
    steps = -(-(visual + SHORT_TEXT + ANSWER) // CAPACITY_STEP)
    return min(steps * CAPACITY_STEP, m.decoder.context)


def profiles(stage: str, inputs: Iterable[onnx.ValueInfoProto], m: Manifest, size: Limits) -> list[Profile]:
    """The profiles of a stage: one, or two for the decoder (prefill, then one token at a time).

    Args:
        stage: The stage's name.
        inputs: Its inputs; those of fixed shape are left out of the profiles.
        m: The bundle's manifest.
        size: The sizes to build for.
    """
    inputs = list(inputs)
    if stage == "decoder":
        return _decoder_profiles(inputs, size)
    ranges: dict[str, Range] = {
        "b": TRUNK_FRAMES,
        "T": size.frames,
        "t": size.frames,
        "L": (1, min(QUESTION, size.question), size.question),
    }
    if stage == "pooling" and m.pooling.windowed:
        return [_pooling_profile(inputs, m, size, ranges)]
    return [_profile(inputs, ranges)]


def _decoder_profiles(inputs: list[onnx.ValueInfoProto], size: Limits) -> list[Profile]:
    """s: new positions; past and total: positions of a KV cache that grows, before and after the pass."""
    prefill: Range = (1, size.prefill, size.capacity)
    decode: Range = (1, 1, 1)
    room = size.capacity - 1
    if size.decoder_profiles == 1:
        anywhere: Range = (0, 0, room)
        return [_profile(inputs, {"s": prefill, "past": anywhere, "total": _sum(prefill, anywhere)})]
    passes: list[tuple[Range, Range]] = [
        (prefill, (0, 0, 0)),
        (decode, (1, min(size.prefill, room), room)),
    ]
    return [_profile(inputs, {"s": s, "past": past, "total": _sum(s, past)}) for s, past in passes]


def _pooling_profile(
    inputs: list[onnx.ValueInfoProto], m: Manifest, size: Limits, ranges: dict[str, Range]
) -> Profile:
    """Clips of at least one window; kernel and stride, if they are inputs, range over their values."""
    kinds = (m.pooling.video, m.pooling.image)
    usual = size.frames[1]
    least = min(w.min_frames() for w in kinds)
    ranges = {**ranges, "t": (least, max(least, usual), max(least, size.frames[2]))}
    profile = _profile(inputs, ranges)
    if "kernel" in {v.name for v in inputs}:
        windows = [_windows(w, m, frames) for w in kinds for frames in (usual, *ranges["t"])]
        for i, name in enumerate(("kernel", "stride")):
            values = [pair[i] for pair in windows]
            profile[name] = tuple(map(min, *values)), values[0], tuple(map(max, *values))
    return profile


def _windows(w: Windows, m: Manifest, frames: int) -> tuple[Triple, Triple]:
    """Kernel and stride for a clip of `frames` frames, or of as many as fill a window."""
    _, kernel, stride = w.resolve((max(frames, w.min_frames()), *m.vision.grid))
    return kernel, stride


def _sum(a: Range, b: Range) -> Range:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _profile(inputs: list[onnx.ValueInfoProto], ranges: dict[str, Range]) -> Profile:
    profile: Profile = {}
    for value in inputs:
        dimensions = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        if all(isinstance(d, int) for d in dimensions):
            continue
        smallest, usual, largest = (
            tuple(d if isinstance(d, int) else ranges[d][i] for d in dimensions) for i in range(3)
        )
        profile[value.name] = smallest, usual, largest
    return profile
