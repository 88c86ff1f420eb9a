"""Quantisation as a pass over a graph: constant-weight products become explicit Quantize/DequantizeLinear, in the one form that ONNX
Runtime runs fast and TensorRT builds.

    w8    x @ Dequantize(INT8, a scale per column)                                           weight only
    w4    x @ Dequantize(INT4, a scale per block of rows)                                    weight only
    w8a8  Cast(Dequantize(Quantize(Cast(x))) @ Dequantize(INT8, a scale per column))         scales in float32, between casts

Zero points are 0. Similarity, softmaxes, norms and attention itself are never touched. What happens to which layer is a `Plan`: made from
the precision alone (weight-only) or by calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import ONNX_TYPE, SCALE, Tensor, Weight
from ppllava_edge.export.quantisation.rounding import Rounded, round_int4, round_int8

NORMS = ("LayerNormalization", "RMSNormalization")
MIN_WEIGHT = 1024  # values; smaller matrices aren't worth it
HEADS = ("lm_head.weight", "embed_tokens.weight.head")  # logits: never below 8 bits


@dataclass(frozen=True)
class Scheme:
    """How one layer is stored. kind: float, w8, w4 or w8a8. block: rows per scale of w4. activation_scale: of w8a8. importance (K,): mean
    squares of the input, which weigh w4's rounding errors. why: for the report."""

    kind: str
    block: int = 32
    activation_scale: float = 0.0
    importance: np.ndarray | None = field(default=None, compare=False, repr=False)
    why: str = ""


@dataclass
class Plan:
    """Schemes by weight name, and folds by group: factors s (K,) that divide a group's input and multiply the rows of its weights, so that
    nothing changes in exact arithmetic (SmoothQuant, AWQ). cache: scales of an INT8 KV cache, by the name of the past's input; empty: float."""

    schemes: dict[str, Scheme] = field(default_factory=dict)
    folds: dict[str, np.ndarray] = field(default_factory=dict)
    cache: dict[str, float] = field(default_factory=dict)


@dataclass
class Layer:
    """A constant-weight product: the matrix (inputs, outputs), the nodes that use it, and the group that shares its input.

    group: the name of the weight that a fold would change: the norm's before it, or the linear's whose columns are its input; else the
    name of the input value, which nothing can be folded into.
    """

    weight: str
    inputs: int
    outputs: int
    nodes: list[onnx.NodeProto]
    group: str
    foldable: bool


@dataclass
class LayerRecord:
    """What became of a layer; sqnr (decibels, of the weight alone) and bytes are known when it has been written."""

    weight: str
    shape: tuple[int, int]
    scheme: Scheme
    sqnr: float | None = None
    bytes: int = 0


def find_layers(g: Graph) -> list[Layer]:
    """The products that can be quantised, in the order of computation."""
    producers = g.producers()
    found: dict[str, Layer] = {}
    for node in g.nodes:
        weight = g.weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or len(weight.tensor.shape) != 2 or weight.tensor.count < MIN_WEIGHT:
            continue
        name, (inputs, outputs) = node.input[1], weight.tensor.shape
        if name in found:
            found[name].nodes.append(node)
            continue
        group = _fold_target(g, producers, node.input[0])
        found[name] = Layer(name, inputs, outputs, [node], group or node.input[0], group is not None)
    return list(found.values())


def _fold_target(g: Graph, producers: dict[str, onnx.NodeProto], x: str) -> str | None:
    """The weight into which 1/s of this value can be folded: the norm that makes it, or the `up` of silu(gate) * up."""
    node = producers.get(x)
    while node is not None and node.op_type == "Gather":  # the last position
        node = producers.get(node.input[0])
    if node is None:
        return None
    if node.op_type in NORMS:
        return node.input[1]
    if node.op_type == "Mul":
        gate, up = (producers.get(name) for name in node.input)
        if gate is not None and up is not None and gate.op_type == "Mul" and up.op_type == "MatMul":
            return up.input[1] if up.input[1] in g.weights else None
    return None


def weight_only_plan(g: Graph, precision: str, block: int = 32) -> Plan:
    """INT8 or INT4 for every layer from the weights alone."""
    schemes = {layer.weight: weight_only(layer, precision, block) for layer in find_layers(g)}
    return Plan(schemes)


def weight_only(layer: Layer, precision: str, block: int, importance: np.ndarray | None = None) -> Scheme:
    """int4 where its blocks are whole and the layer is no head, else int8."""
    if precision == "int4" and not layer.weight.endswith(HEADS) and layer.outputs % 2 == 0:
        for size in (block, 64, 32, 16):
            if size <= block and layer.inputs % size == 0:
                return Scheme("w4", size, importance=importance)
    return Scheme(
        "w8", why="the head stays at 8 bits" if precision == "int4" and layer.weight.endswith(HEADS) else ""
    )


def quantize(g: Graph, plan: Plan) -> list[LayerRecord]:
    """Rewrite g by the plan. Weights are rounded when the graph is saved, one at a time; the records are complete then."""
    layers = find_layers(g)
    columns = _fold(g, plan, layers)
    replaced: dict[int, list[onnx.NodeProto]] = {}
    records, quantized_inputs = [], dict[tuple[str, float], str]()
    for layer in layers:
        scheme = plan.schemes.get(layer.weight, Scheme("float"))
        record = LayerRecord(
            layer.weight, (layer.inputs, layer.outputs), scheme, bytes=g.weights[layer.weight].bytes
        )
        records.append(record)
        if scheme.kind == "float":
            _multiply(g, layer.weight, plan.folds.get(layer.group), columns.get(layer.weight))
            continue
        dequantize, restored = _stored(
            g, layer, scheme, plan.folds.get(layer.group), columns.get(layer.weight), record
        )
        for i, node in enumerate(layer.nodes):
            product = (
                _quantized_activation(g, node, scheme, restored, quantized_inputs)
                if scheme.kind == "w8a8"
                else [_with_weight(node, restored)]
            )
            replaced[id(node)] = ([dequantize] if i == 0 else []) + product
    g.nodes = [new for node in g.nodes for new in replaced.get(id(node), [node])]
    if plan.cache:
        _quantize_cache(g, plan.cache)
    return records


def cache_writes(g: Graph) -> dict[str, str]:
    """Past input → the new keys or values that are written into it."""
    return {node.input[0]: node.input[1] for node in g.nodes if node.op_type == "TensorScatter"}


def _quantize_cache(g: Graph, scales: dict[str, float]) -> None:
    """Quantise keys and values before they are written, restore the whole cache before attention reads it."""
    int8, half = ONNX_TYPE["int8"], g.dtype == "float16"
    writes = {node.output[0]: node for node in g.nodes if node.op_type == "TensorScatter"}
    for value in [*g.inputs, *g.outputs]:
        if value.name in writes or value.name.startswith("past."):
            value.type.tensor_type.elem_type = int8
    nodes: list[onnx.NodeProto] = []
    restored: dict[str, str] = {}
    for node in g.nodes:
        if node.op_type != "TensorScatter":
            for i, name in enumerate(node.input):
                node.input[i] = restored.get(name, name)
            nodes.append(node)
            continue
        past, new, present = node.input[0], node.input[1], node.output[0]
        scale = g.weight(Tensor.of(f"{past}{SCALE}", np.array(scales[past], np.float32)), "float32")
        zero = g.weight(Tensor.of(f"{past}.zero_point", np.array(0, np.int8)), "int8")
        wide = f"{new}.float32" if half else new
        if half:
            nodes.append(helper.make_node("Cast", [new], [wide], name=wide, to=ONNX_TYPE["float32"]))
        node.input[1] = f"{new}.int8"
        nodes += [
            helper.make_node("QuantizeLinear", [wide, scale, zero], [node.input[1]], name=node.input[1]),
            node,
        ]
        back = f"{present}.restored"
        nodes.append(helper.make_node("DequantizeLinear", [present, scale, zero], [back], name=back))
        if half:
            nodes.append(
                helper.make_node(
                    "Cast", [back], [f"{back}.half"], name=f"{back}.half", to=ONNX_TYPE["float16"]
                )
            )
        restored[present] = f"{back}.half" if half else back
    g.nodes = nodes


def _fold(g: Graph, plan: Plan, layers: Sequence[Layer]) -> dict[str, np.ndarray]:
    """Divide norms by their group's factors. Returns, for linears that take a fold in their columns, what those are multiplied by."""
    norms = {node.input[1]: node for node in g.nodes if node.op_type in NORMS}
    columns = {}
    for group in {layer.group for layer in layers if layer.foldable} & set(plan.folds):
        inverse = (1 / plan.folds[group]).astype(np.float32)
        if group in norms:
            for name in norms[group].input[1:]:
                _multiply(g, name, inverse, None)
        else:
            columns[group] = inverse
    return columns


def _multiply(g: Graph, name: str, rows: np.ndarray | None, columns: np.ndarray | None) -> None:
    """Multiply a weight's rows (or a vector) and columns; it is still loaded only when it is stored."""
    if rows is None and columns is None:
        return
    weight = g.weights[name]

    def scaled(array: np.ndarray) -> np.ndarray:
        array = np.asarray(array, np.float32)
        if rows is not None:
            array = array * (rows[:, None] if array.ndim == 2 else rows)
        return array if columns is None else array * columns

    g.weights[name] = Weight(weight.tensor.map(scaled, weight.tensor.shape), weight.dtype)


def _stored(
    g: Graph,
    layer: Layer,
    scheme: Scheme,
    rows: np.ndarray | None,
    columns: np.ndarray | None,
    record: LayerRecord,
) -> tuple[onnx.NodeProto, str]:
    """Put the rounded weight and its scales in the place of the float one. Returns the node that restores it, and its output."""
    scale_dtype = "float32" if scheme.kind == "w8a8" else g.dtype
    source = g.weights.pop(layer.weight).tensor
    name, scale_name, restored = (
        f"{layer.weight}.{'int4' if scheme.kind == 'w4' else 'int8'}",
        layer.weight + SCALE,
        layer.weight + ".restored",
    )
    int4 = scheme.kind == "w4"
    scale_shape = (layer.inputs // scheme.block, layer.outputs) if int4 else (layer.outputs,)

    def compute() -> tuple[np.ndarray, np.ndarray]:
        array = source.load() if columns is None else np.asarray(source.load(), np.float32) * columns
        rounded: Rounded = (
            round_int4(array, scheme.block, scale_dtype, rows, scheme.importance)
            if int4
            else round_int8(array, scale_dtype, rows)
        )
        record.sqnr = rounded.sqnr
        return rounded.values, rounded.scales

    both = _Once(compute)
    values = Tensor(name, source.shape, lambda: both.take(0))
    scales = Tensor(scale_name, scale_shape, lambda: both.take(1))
    g.weights[name], g.weights[scale_name] = (
        Weight(values, "int4" if int4 else "int8"),
        Weight(scales, scale_dtype),
    )
    record.bytes = g.weights[name].bytes + g.weights[scale_name].bytes
    attributes: dict[str, Any] = {"axis": 0, "block_size": scheme.block} if int4 else {"axis": 1}
    return helper.make_node(
        "DequantizeLinear", [name, scale_name], [restored], name=restored, **attributes
    ), restored


def _quantized_activation(
    g: Graph, node: onnx.NodeProto, scheme: Scheme, restored: str, known: dict[tuple[str, float], str]
) -> list[onnx.NodeProto]:
    """Quantise and restore the input (once for all layers that share it), multiply in float32, go back to the graph's type."""
    nodes, half = [], g.dtype == "float16"
    x, key = node.input[0], (node.input[0], scheme.activation_scale)
    if key not in known:
        scale = g.weight(
            Tensor.of(f"{node.name}.input{SCALE}", np.array(scheme.activation_scale, np.float32)), "float32"
        )
        zero = g.weight(Tensor.of(f"{node.name}.input.zero_point", np.array(0, np.int8)), "int8")
        wide = f"{node.name}.input.float32" if half else x
        if half:
            nodes.append(helper.make_node("Cast", [x], [wide], name=wide, to=ONNX_TYPE["float32"]))
        quantized, known[key] = f"{node.name}.input.int8", f"{node.name}.input.restored"
        nodes.append(helper.make_node("QuantizeLinear", [wide, scale, zero], [quantized], name=quantized))
        nodes.append(
            helper.make_node("DequantizeLinear", [quantized, scale, zero], [known[key]], name=known[key])
        )
    product = _with_weight(node, restored)
    product.input[0] = known[key]
    if not half:
        return [*nodes, product]
    product.output[0] = node.output[0] + ".float32"
    back = helper.make_node(
        "Cast",
        [product.output[0]],
        [node.output[0]],
        name=product.output[0] + ".back",
        to=ONNX_TYPE["float16"],
    )
    return [*nodes, product, back]


def _with_weight(node: onnx.NodeProto, weight: str) -> onnx.NodeProto:
    return helper.make_node("MatMul", [node.input[0], weight], list(node.output), name=node.name)


class _Once:
    """Two arrays that are computed together, once, and dropped when both were taken."""

    def __init__(self, compute: Callable[[], tuple[np.ndarray, np.ndarray]]):
        self._compute, self._parts = compute, dict[int, np.ndarray]()

    def take(self, index: int) -> np.ndarray:
        if index not in self._parts:
            self._parts = dict(enumerate(self._compute()))
        return self._parts.pop(index)
