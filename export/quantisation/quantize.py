"""Quantisation as a pass over a graph.

Products with constant weights become explicit QuantizeLinear and DequantizeLinear nodes, in the one form that
ONNX Runtime runs fast and TensorRT builds:

    w8    x @ Dequantize(INT8, a scale per column)                                      weights only
    w4    x @ Dequantize(INT4, a scale per block of rows)                               weights only
    w8a8  Cast(Dequantize(Quantize(Cast(x))) @ Dequantize(INT8, a scale per column))    float32 scales

Zero points are 0. Similarity, softmaxes, norms and attention itself stay float. A `Plan` says what happens to
each layer; it comes from the precision alone (weight-only) or from calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import ONNX_TYPE, SCALE, Tensor, Weight
from ppllava_edge.export.quantisation.kv_cache import quantize_cache
from ppllava_edge.export.quantisation.plan import NORMS, Layer, LayerRecord, Plan, Scheme, find_layers
from ppllava_edge.export.quantisation.rounding import Rounded, round_int4, round_int8

QuantizedInputs = dict[tuple[str, float], str]  # (value, scale) → its quantised and restored value


def quantize(g: Graph, plan: Plan) -> list[LayerRecord]:
    """Rewrite a graph according to a plan.

    Weights are rounded one at a time when the graph is saved; only then is `sqnr` of the records set.

    Returns:
        A record per layer, in the order of computation.
    """
    layers = find_layers(g)
    columns = _fold_norms(g, plan, layers)
    replacements: dict[int, list[onnx.NodeProto]] = {}
    quantized_inputs: QuantizedInputs = {}
    records = []
    for layer in layers:
        scheme = plan.schemes.get(layer.weight, Scheme("float"))
        size = g.weights[layer.weight].bytes
        record = LayerRecord(layer.weight, (layer.inputs, layer.outputs), scheme, bytes=size)
        records.append(record)
        row_factors, column_factors = plan.folds.get(layer.group), columns.get(layer.weight)
        if scheme.kind == "float":
            _multiply(g, layer.weight, row_factors, column_factors)
            continue
        _multiply(g, layer.weight, None, column_factors)
        dequantize = _round_weight(g, layer, scheme, row_factors, record)
        for i, node in enumerate(layer.nodes):
            new_nodes = [dequantize] if i == 0 else []
            if scheme.kind == "w8a8":
                new_nodes += _quantize_input(g, node, scheme, dequantize.output[0], quantized_inputs)
            else:
                new_nodes.append(_product(node, node.input[0], dequantize.output[0], node.output[0]))
            replacements[id(node)] = new_nodes
    g.nodes = [new for node in g.nodes for new in replacements.get(id(node), [node])]
    if plan.cache:
        quantize_cache(g, plan.cache)
    return records


def _fold_norms(g: Graph, plan: Plan, layers: Sequence[Layer]) -> dict[str, np.ndarray]:
    """Divide norms by their group's factors.

    Returns the factors (N,) for the columns of linear layers that take a fold instead of a norm.
    """
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
    """Multiply a weight's rows (or a vector) and columns; it is still loaded only when saved."""
    if rows is None and columns is None:
        return
    weight = g.weights[name]

    def scaled(array: np.ndarray) -> np.ndarray:
        array = np.asarray(array, np.float32)
        if rows is not None:
            array = array * (rows[:, None] if array.ndim == 2 else rows)
        return array if columns is None else array * columns

    g.weights[name] = Weight(weight.tensor.map(scaled, weight.tensor.shape), weight.dtype)


def _round_weight(
    g: Graph, layer: Layer, scheme: Scheme, rows: np.ndarray | None, record: LayerRecord
) -> onnx.NodeProto:
    """Replace a float weight by its rounded values and scales; return the node that dequantises them.

    rows: factors (K,) by which the rows are multiplied before rounding.
    """
    is_int4 = scheme.kind == "w4"
    dtype = "int4" if is_int4 else "int8"
    scale_dtype = "float32" if scheme.kind == "w8a8" else g.dtype
    source = g.weights.pop(layer.weight).tensor

    def compute() -> tuple[np.ndarray, np.ndarray]:
        rounded: Rounded
        if is_int4:
            rounded = round_int4(source.load(), scheme.block, scale_dtype, rows, scheme.importance)
        else:
            rounded = round_int8(source.load(), scale_dtype, rows)
        record.sqnr = rounded.sqnr
        return rounded.values, rounded.scales

    pair = _Pair(compute)
    name, scale_name = f"{layer.weight}.{dtype}", layer.weight + SCALE
    scale_shape = (layer.inputs // scheme.block, layer.outputs) if is_int4 else (layer.outputs,)
    g.weights[name] = Weight(Tensor(name, source.shape, lambda: pair.take(0)), dtype)
    g.weights[scale_name] = Weight(Tensor(scale_name, scale_shape, lambda: pair.take(1)), scale_dtype)
    record.bytes = g.weights[name].bytes + g.weights[scale_name].bytes
    attributes: dict[str, Any] = {"axis": 0, "block_size": scheme.block} if is_int4 else {"axis": 1}
    restored = layer.weight + ".restored"
    return helper.make_node("DequantizeLinear", [name, scale_name], [restored], name=restored, **attributes)


def _quantize_input(
    g: Graph, node: onnx.NodeProto, scheme: Scheme, weight: str, quantized_inputs: QuantizedInputs
) -> list[onnx.NodeProto]:
    """The nodes of a w8a8 product, which multiplies in float32. Layers share the rounded input."""
    x, y = node.input[0], node.output[0]
    is_half = g.dtype == "float16"
    key = (x, scheme.activation_scale)
    nodes = []
    if key not in quantized_inputs:
        nodes = _quantize_and_restore(g, x, scheme.activation_scale, f"{node.name}.input", is_half)
        quantized_inputs[key] = nodes[-1].output[0]
    if not is_half:
        return [*nodes, _product(node, quantized_inputs[key], weight, y)]
    wide = f"{y}.float32"
    product = _product(node, quantized_inputs[key], weight, wide)
    cast = helper.make_node("Cast", [wide], [y], name=f"{wide}.back", to=ONNX_TYPE["float16"])
    return [*nodes, product, cast]


def _quantize_and_restore(
    g: Graph, x: str, scale_value: float, name: str, is_half: bool
) -> list[onnx.NodeProto]:
    """Nodes that quantise a value to INT8 and dequantise it; the last one outputs the float32 result."""
    scale = g.weight(Tensor.of(f"{name}{SCALE}", np.array(scale_value, np.float32)), "float32")
    zero = g.weight(Tensor.of(f"{name}.zero_point", np.array(0, np.int8)), "int8")
    nodes = []
    wide, rounded, restored = x, f"{name}.int8", f"{name}.restored"
    if is_half:
        wide = f"{name}.float32"
        nodes.append(helper.make_node("Cast", [x], [wide], name=wide, to=ONNX_TYPE["float32"]))
    nodes.append(helper.make_node("QuantizeLinear", [wide, scale, zero], [rounded], name=rounded))
    nodes.append(helper.make_node("DequantizeLinear", [rounded, scale, zero], [restored], name=restored))
    return nodes


def _product(node: onnx.NodeProto, x: str, weight: str, output: str) -> onnx.NodeProto:
    return helper.make_node("MatMul", [x, weight], [output], name=node.name)


class _Pair:
    """Two arrays that are computed together, once, and released after both were taken."""

    def __init__(self, compute: Callable[[], tuple[np.ndarray, np.ndarray]]):
        self._compute = compute
        self._parts: dict[int, np.ndarray] = {}

    def take(self, index: int) -> np.ndarray:
        if index not in self._parts:
            self._parts = dict(enumerate(self._compute()))
        return self._parts.pop(index)
