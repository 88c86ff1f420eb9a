"""What a bundle needs, from shapes alone: disk, memory of export and of a run, the largest allocation, and what would fit.

The coefficients were measured (docs/measurements.md says on what): resident memory of ONNX Runtime's CPU provider per stored byte of each
kind of weight, and what an answer needs beside the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.terminal import human_bytes

PYTHON = 110e6  # interpreter, numpy, PyAV, tokenizers, ONNX Runtime: resident before a model is opened
EXPORT = 150e6  # the same for an export, with onnx and graphs without weights


@dataclass(frozen=True)
class StageShape:
    """One stage's weights. counts: values by how they are stored (float32, float16, int8, int4). block: weights per INT4 scale. largest:
    values of the largest matrix. columns: outputs of its INT8 matrices in all, each with a scale."""

    name: str
    counts: dict[str, int]
    largest: int
    block: int = 32

    @property
    def stored(self) -> float:
        """Bytes in the standard graph, scales included."""
        c = self.counts
        return (
            4 * c.get("float32", 0)
            + 2 * c.get("float16", 0)
            + c.get("int8", 0) * 1.001
            + c.get("int4", 0) * (0.5 + 2 / self.block)
        )

    @property
    def engine(self) -> float:
        """Bytes in engines/cpu: floats as float32, INT4 scales as float32."""
        c = self.counts
        return (
            4 * (c.get("float32", 0) + c.get("float16", 0))
            + c.get("int8", 0) * 1.015
            + c.get("int4", 0) * (0.5 + 4 / self.block)
        )

    @property
    def resident(self) -> float:
        """Bytes that ONNX Runtime holds: INT4 packed with a scale and a sum per block."""
        c = self.counts
        return (
            4 * (c.get("float32", 0) + c.get("float16", 0))
            + c.get("int8", 0) * 1.03
            + c.get("int4", 0) * (0.5 + 8 / self.block)
        )


@dataclass(frozen=True)
class Shape:
    """A model as far as memory is concerned. frame_tokens: tokens of a frame in the tower, class token included."""

    stages: tuple[StageShape, ...]
    embeddings: float  # bytes
    frames: int
    frame_tokens: int
    vision_width: int
    vision_mlp: int
    states: int
    visual_tokens: int
    decoder_width: int
    decoder_mlp: int
    layers: int
    kv_heads: int
    head_size: int
    vocab: int
    context: int
    kv_bytes: int  # of one value of the cache as it is at run time
    engine: bool  # whether engines/cpu is written too
    source_bytes: int = 2  # of a value in the checkpoint

    @property
    def prompt(self) -> int:
        """Positions: visual tokens, a question, and an answer of 128 tokens."""
        return self.visual_tokens + 64 + 128


@dataclass(frozen=True)
class Estimate:
    """Bytes. bundle: on disk, engines/cpu included. export, run: peak resident memory. largest: the largest single allocation."""

    bundle: float
    export: float
    run: float
    largest: float
    cache: float

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        return [
            ("bundle on disk", human_bytes(self.bundle)),
            ("peak memory of the export", human_bytes(self.export)),
            ("peak memory of an answer", human_bytes(self.run)),
            ("of that, KV cache", human_bytes(self.cache)),
            ("largest single allocation", human_bytes(self.largest)),
        ]


def estimate(s: Shape) -> Estimate:
    """All figures for one shape."""
    stored = sum(stage.stored for stage in s.stages) + s.embeddings
    engine = sum(stage.engine for stage in s.stages) if s.engine else 0.0
    capacity = min(-(-s.prompt // 256) * 256, s.context)
    cache = 2.0 * s.layers * s.kv_heads * s.head_size * capacity * s.kv_bytes
    largest_weight = max(stage.largest for stage in s.stages)
    run = PYTHON + max(_while_seeing(s), _while_answering(s, cache))
    return Estimate(
        stored + engine,
        EXPORT + _export_peak(s, largest_weight),
        run,
        _largest(s, largest_weight, cache),
        cache,
    )


def _export_peak(s: Shape, largest: int) -> float:
    """The largest matrix as it is read, and rounded (or copied) beside it."""
    return largest * (s.source_bytes + 1.5)


def _while_seeing(s: Shape) -> float:
    """While a clip is encoded, before the decoder is opened: the towers, their states, and what the trunk or the branch computes with."""
    features = 4.0 * s.frames * s.frame_tokens * s.vision_width
    at_once = max(1, min(4, 2400 // s.frame_tokens))
    trunk = 4.0 * at_once * s.frame_tokens * (8 * s.vision_width + 2 * s.vision_mlp)
    branch = (
        4.0 * s.frames * s.frame_tokens * (6 * s.vision_width + 2 * s.vision_mlp) if s.states > 1 else 0.0
    )
    return (
        sum(stage.resident for stage in s.stages if stage.name in ("trunk", "temporal"))
        + (s.states + 1) * features
        + max(trunk, branch)
    )


def _while_answering(s: Shape, cache: float) -> float:
    """With every stage open: weights, cache, the clip's features, and what prefill computes with."""
    features = 4.0 * s.frames * s.frame_tokens * s.vision_width
    prefill = 4.0 * s.prompt * (3 * s.decoder_mlp + 8 * s.decoder_width)
    return sum(stage.resident for stage in s.stages) + cache + features + prefill


def _largest(s: Shape, largest_weight: int, cache: float) -> float:
    per_layer = cache / (2 * s.layers)
    return max(per_layer, 4.0 * s.frames * s.frame_tokens * s.vision_width * s.states, largest_weight * 1.0)


def suggest(s: Shape, limit: float, int4: Shape | None) -> list[str]:
    """What to change so that an answer fits `limit` bytes, the mildest first. int4: the same model at --precision int4, if it isn't already."""
    now = estimate(s).run
    if now <= limit:
        longest = s
        while (
            longest.context > longest.prompt + 256
            and estimate(replace(longest, visual_tokens=longest.visual_tokens + 256)).run <= limit
        ):
            longest = replace(longest, visual_tokens=longest.visual_tokens + 256)
        return [
            f"it fits: {human_bytes(now)} of {human_bytes(limit)}, prompts of up to {longest.prompt} positions would"
        ]
    ways: list[tuple[str, float]] = []
    for base, label in ((s, ""), (int4, "--precision int4")):
        for frames in (s.frames, 16, 8, 4):
            for kv in (s.kv_bytes, 1):
                if (
                    base is None
                    or frames > s.frames
                    or (base is s and frames == s.frames and kv == s.kv_bytes)
                ):
                    continue
                other = replace(
                    base,
                    frames=frames,
                    visual_tokens=s.visual_tokens * frames // s.frames,
                    kv_bytes=min(base.kv_bytes, kv),
                )
                precision = (
                    (label or "--precision …") + ",kv=int8" if other.kv_bytes < base.kv_bytes else label
                )
                words = " ".join(
                    part for part in (precision, f"--frames {frames}" if frames < s.frames else "") if part
                )
                if words and words not in [w for w, _ in ways]:
                    ways.append((words, estimate(other).run))
    fitting = [f"{words}: {human_bytes(size)}" for words, size in ways if size <= limit]
    if fitting:
        return [
            f"it doesn't fit {human_bytes(limit)}: it needs {human_bytes(now)}; what would:",
            *fitting[:5],
        ]
    least = min((size for _, size in ways), default=now)
    return [
        f"nothing here makes it fit {human_bytes(limit)}: the least, with int4, 4 frames and an INT8 cache, is {human_bytes(least)}"
    ]


def shape_of(
    graphs: Mapping[str, Any], manifest: Manifest, embeddings: float, engine: bool, frames: int | None = None
) -> Shape:
    """The shape of a model from its graphs (engines.graph.Graph, already quantised, weights not loaded). embeddings: bytes of their file."""
    v, d, count = manifest.vision, manifest.decoder, frames or manifest.vision.default_frames
    stages = tuple(_stage(name, g) for name, g in graphs.items())
    kv = {"float32": 4, "float16": 2, "int8": 1}[d.kv_dtype]
    return Shape(
        stages,
        embeddings,
        count,
        v.patches + v.class_token,
        v.hidden_size,
        _widest(graphs["trunk"], v.hidden_size),
        v.states if v.max_frames else 0,
        _visual_tokens(manifest, count),
        d.hidden_size,
        _widest(graphs["decoder"], d.hidden_size),
        d.layers,
        d.kv_heads,
        d.head_size,
        d.vocab,
        d.context,
        kv,
        engine,
    )


def _stage(name: str, g: Any) -> StageShape:
    counts: dict[str, int] = {}
    for weight_name, weight in g.weights.items():
        if not weight_name.endswith(".scale"):
            counts[weight.dtype] = counts.get(weight.dtype, 0) + weight.tensor.count
    blocks = [
        a.i
        for node in g.nodes
        if node.op_type == "DequantizeLinear"
        for a in node.attribute
        if a.name == "block_size"
    ]
    largest = max((weight.tensor.count for weight in g.weights.values()), default=0)
    return StageShape(name, counts, largest, min(blocks, default=32))


def _widest(g: Any, width: int) -> int:
    """Of the feed-forward layers: outputs of the widest matrix that reads the model's width, heads left out."""
    shapes = [
        (name, w.tensor.shape)
        for name, w in g.weights.items()
        if len(w.tensor.shape) == 2 and ".mlp." in name
    ]
    return max(
        (shape[1] for name, shape in shapes if shape[0] == width and not name.endswith(".scale")),
        default=4 * width,
    )


def _visual_tokens(m: Manifest, frames: int) -> int:
    if not m.pooling.windowed:
        t, h, w = m.pooling.pooled_shape or (frames if m.pooling.method == "none" else 1, *m.vision.grid)
        return t * h * w
    output, *_ = m.pooling.video.resolve((max(frames, m.pooling.video.min_frames()), *m.vision.grid))
    return output[0] * output[1] * output[2]


def parse_size(text: str) -> float:
    """ "8GB", "500 MB" or a number of bytes → bytes. Raises PPLLaVAError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise PPLLaVAError(f"{text!r} is no size; write one like 8GB or 500MB")
    base = 1024.0 if match[3] else 1000.0
    return float(match[1]) * base ** " kmgt".index(match[2] or " ")
