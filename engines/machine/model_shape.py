"""The sizes of a model that decide how much memory it needs, read from its graphs without loading weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ppllava_edge.engines.bundle.manifest import Manifest

KV_BYTES = {"float32": 4, "float16": 2, "int8": 1}
QUESTION_TOKENS = 64  # a usual question with its prompt template
ANSWER_TOKENS = 128


@dataclass(frozen=True)
class StageShape:
    """The weights of one stage.

    Attributes:
        name: The stage's name.
        counts: Number of values by dtype: float32, float16, int8, int4.
        largest: Values of the largest matrix.
        block: Weights per INT4 scale.
    """

    name: str
    counts: dict[str, int]
    largest: int
    block: int = 32

    @property
    def stored(self) -> float:
        """Bytes in the standard graph, scales included."""
        return self._bytes(float16=2, int8=1.001, int4_scale=2)

    @property
    def engine(self) -> float:
        """Bytes in engines/cpu, where floats and scales are float32."""
        return self._bytes(float16=4, int8=1.015, int4_scale=4)

    @property
    def resident(self) -> float:
        """Bytes in ONNX Runtime's memory, where INT4 weights are packed with a scale and a sum per block."""
        return self._bytes(float16=4, int8=1.03, int4_scale=8)

    def _bytes(self, float16: float, int8: float, int4_scale: float) -> float:
        """Bytes of all weights, for bytes per float16 and int8 value and per block of INT4 values."""
        per_value = {"float32": 4, "float16": float16, "int8": int8, "int4": 0.5 + int4_scale / self.block}
        return sum(count * per_value.get(dtype, 0) for dtype, count in self.counts.items())


@dataclass(frozen=True)
class Shape:
    """The sizes of a model and a clip that determine memory use.

    Attributes:
        stages: Weights by stage.
        embeddings: Bytes of the token embeddings' file.
        frames: Frames of the clip.
        frame_tokens: Positions of a frame in the vision tower, class token included.
        vision_width: Width of the vision tower.
        vision_mlp: Width of its feed-forward layers.
        states: Hidden states that the temporal adapter reads; 0 without one.
        visual_tokens: Visual tokens of the clip.
        decoder_width: Width of the decoder.
        decoder_mlp: Width of its feed-forward layers.
        layers: Decoder layers.
        kv_heads: Heads of keys and values.
        head_size: Width of a head.
        vocab: Size of the vocabulary.
        context: Maximum number of positions.
        kv_bytes: Bytes of one value of the KV cache at run time.
        engine: Whether the bundle has engines/cpu too.
        source_bytes: Bytes of one value in the checkpoint.
    """

    stages: tuple[StageShape, ...]
    embeddings: float
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
    kv_bytes: int
    engine: bool
    source_bytes: int = 2

    @property
    def prompt(self) -> int:
        """Positions of the visual tokens, a question and an answer."""
        return self.visual_tokens + QUESTION_TOKENS + ANSWER_TOKENS


def shape_of(
    graphs: Mapping[str, Any], manifest: Manifest, embeddings: float, engine: bool, frames: int | None = None
) -> Shape:
    """The shape of a model.

    Args:
        graphs: Stage → engines.graphs.graph.Graph, already quantised; weights needn't be loaded.
        manifest: The bundle's manifest.
        embeddings: Bytes of the token embeddings' file.
        engine: Whether the bundle has engines/cpu too.
        frames: Frames of the clip; None: the model's default.
    """
    v, d, pooling = manifest.vision, manifest.decoder, manifest.pooling
    count = frames or v.default_frames
    fewest = pooling.min_frames
    return Shape(
        stages=tuple(_stage(name, g) for name, g in graphs.items()),
        embeddings=embeddings,
        frames=count,
        frame_tokens=v.patches + v.class_token,
        vision_width=v.hidden_size,
        vision_mlp=_feed_forward_width(graphs["trunk"], v.hidden_size),
        states=v.states if v.max_frames else 0,
        visual_tokens=pooling.tokens(max(count, fewest), v.grid),
        decoder_width=d.hidden_size,
        decoder_mlp=_feed_forward_width(graphs["decoder"], d.hidden_size),
        layers=d.layers,
        kv_heads=d.kv_heads,
        head_size=d.head_size,
        vocab=d.vocab,
        context=d.context,
        kv_bytes=KV_BYTES[d.kv_dtype],
        engine=engine,
    )


def _stage(name: str, g: Any) -> StageShape:
    counts: dict[str, int] = {}
    for weight_name, weight in g.weights.items():
        if not weight_name.endswith(".scale"):
            counts[weight.dtype] = counts.get(weight.dtype, 0) + weight.tensor.count
    blocks = [
        attribute.i
        for node in g.nodes
        if node.op_type == "DequantizeLinear"
        for attribute in node.attribute
        if attribute.name == "block_size"
    ]
    largest = max((weight.tensor.count for weight in g.weights.values()), default=0)
    return StageShape(name, counts, largest, min(blocks, default=32))


def _feed_forward_width(g: Any, width: int) -> int:
    """Outputs of the widest feed-forward matrix that reads the model's width."""
    widths = [
        weight.tensor.shape[1]
        for name, weight in g.weights.items()
        if ".mlp." in name and not name.endswith(".scale") and len(weight.tensor.shape) == 2
        if weight.tensor.shape[0] == width
    ]
    return max(widths, default=4 * width)
