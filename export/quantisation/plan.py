"""Which layers of a graph can be quantised, and the plan of what happens to each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx

from ppllava_edge.engines.graphs.graph import Graph

NORMS = ("LayerNormalization", "RMSNormalization")
MIN_WEIGHT = 1024  # values; smaller matrices aren't worth quantising
HEADS = ("lm_head.weight", "embed_tokens.weight.head")  # logits: never below 8 bits
BLOCKS = (64, 32, 16)  # rows per INT4 scale to fall back to


@dataclass(frozen=True)
class Scheme:
    """How one layer is stored.

    Attributes:
        kind: float, w8, w4 or w8a8; see quantize.py.
        block: Rows per scale (w4).
        activation_scale: The scale of the layer's input (w8a8).
        importance: Mean squares of the input channels, (K,), which weight the rounding errors (w4); None:
            equal.
        why: A remark for the report.
    """

    kind: str
    block: int = 32
    activation_scale: float = 0.0
    importance: np.ndarray | None = field(default=None, compare=False, repr=False)
    why: str = ""


@dataclass
class Plan:
    """What happens to a graph's layers and cache.

    Attributes:
        schemes: Weight name → scheme; layers without one stay float.
        folds: Group → factors s (K,). A group's input is divided by s and the rows of its weights are
            multiplied by s, which changes nothing in exact arithmetic (SmoothQuant, AWQ).
        cache: Graph input name → scale of the INT8 KV cache; empty for a float cache.
    """

    schemes: dict[str, Scheme] = field(default_factory=dict)
    folds: dict[str, np.ndarray] = field(default_factory=dict)
    cache: dict[str, float] = field(default_factory=dict)


@dataclass
class Layer:
    """A matrix product with a constant weight.

    Attributes:
        weight: Name of the matrix.
        inputs: Its rows, K.
        outputs: Its columns, N.
        nodes: The MatMul nodes that use the matrix.
        group: Layers with the same group share their input. If `foldable`, this names the weight that a fold
            changes: the weight of the preceding norm, or of the linear layer whose columns are the input.
            Otherwise it names the input value.
        foldable: Whether factors can be folded into the group's input.
    """

    weight: str
    inputs: int
    outputs: int
    nodes: list[onnx.NodeProto]
    group: str
    foldable: bool


@dataclass
class LayerRecord:
    """How a layer was stored.

    Attributes:
        weight: Name of the matrix.
        shape: Its (inputs, outputs).
        scheme: How it is stored.
        sqnr: Signal to quantisation noise of the weight, decibels; None until it is written.
        bytes: Stored size of the weight and its scales.
    """

    weight: str
    shape: tuple[int, int]
    scheme: Scheme
    sqnr: float | None = None
    bytes: int = 0


def find_layers(g: Graph) -> list[Layer]:
    """List the products that can be quantised, in the order of computation."""
    producers = g.producers()
    layers: dict[str, Layer] = {}
    for node in g.nodes:
        weight = g.weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or len(weight.tensor.shape) != 2 or weight.tensor.count < MIN_WEIGHT:
            continue
        x, name = node.input
        if name in layers:
            layers[name].nodes.append(node)
            continue
        inputs, outputs = weight.tensor.shape
        group = _fold_target(g, producers, x)
        layers[name] = Layer(name, inputs, outputs, [node], group or x, foldable=group is not None)
    return list(layers.values())


def weight_only_plan(g: Graph, precision: str, block: int = 32) -> Plan:
    """Plan INT8 or INT4 for every layer, without calibration data.

    Args:
        g: The graph.
        precision: int8 or int4.
        block: Rows per INT4 scale.
    """
    return Plan({layer.weight: weight_only(layer, precision, block) for layer in find_layers(g)})


def weight_only(layer: Layer, precision: str, block: int, importance: np.ndarray | None = None) -> Scheme:
    """Choose a layer's weight-only scheme: INT4 if asked for and its rows divide into blocks, else INT8.

    Args:
        layer: The layer. Heads, which compute logits, get INT8.
        precision: int8 or int4.
        block: The most rows per INT4 scale.
        importance: Mean squares of the input channels, (K,), or None.
    """
    is_head = layer.weight.endswith(HEADS)
    if precision == "int4" and not is_head and layer.outputs % 2 == 0:
        for size in (block, *BLOCKS):
            if size <= block and layer.inputs % size == 0:
                return Scheme("w4", size, importance=importance)
    return Scheme("w8", why="the head stays at 8 bits" if precision == "int4" and is_head else "")


def _fold_target(g: Graph, producers: dict[str, onnx.NodeProto], x: str) -> str | None:
    """The weight into which 1/s of a value can be folded: its norm's, or that of `up` in silu(gate) * up."""
    node = producers.get(x)
    while node is not None and node.op_type == "Gather":  # the last position
        node = producers.get(node.input[0])
    if node is None:
        return None
    if node.op_type in NORMS:
        return node.input[1]
    if node.op_type != "Mul":
        return None
    gate, up = (producers.get(name) for name in node.input)
    if gate is None or up is None or gate.op_type != "Mul" or up.op_type != "MatMul":
        return None
    return up.input[1] if up.input[1] in g.weights else None
