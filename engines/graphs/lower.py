"""Opset 24 → basic operators of opset 20, for TensorRT 10.3 (JetPack 6) and older ONNX Runtime versions.

    RMSNormalization, RotaryEmbedding, Attention   → products, sums and a softmax
    TensorScatter (in-place KV cache)              → Concat: the cache grows; write_index is dropped
    DequantizeLinear of INT4                       → float weights, computed when the graph is saved
    PromptGuidedPool3d                             → its function, inlined

A lowered graph computes the same up to rounding. Its KV cache holds only the filled positions: past.i.* has
the shape (1, kv_heads, past, head_size), the mask (1, 1, s, past + s).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner

from ppllava_edge.engines.graphs.graph import DOMAIN, Graph
from ppllava_edge.engines.graphs.tensors import ONNX_TYPE, Tensor, Weight

LOWERED_OPSET = 20
LOWERED_IR = 9
MIN_HEAD_SIZE = 16  # smallest head size of TensorRT's attention kernels


def lower(g: Graph) -> Graph:
    """A lowered copy of a stage's graph; weights are still loaded when it is saved.

    Raises:
        AssertionError: If a KV cache isn't an input of the graph.
    """
    g = _inlined(g.copy())
    inputs = {v.name for v in g.inputs}
    for node in g.nodes:
        if node.op_type == "TensorScatter" and node.input[0] not in inputs:
            raise AssertionError(f"{node.name}: the cache is not an input")
    _int4_to_float(g)
    _apply(g, _RULES)
    if "write_index" in inputs:
        _concatenated_cache(g)
    g.opset = LOWERED_OPSET
    g.ir_version = LOWERED_IR
    g.prune()
    return g


def without_small_attention(g: Graph, least: int = MIN_HEAD_SIZE) -> Graph:
    """A copy in which attention with heads smaller than `least` is written as products and a softmax."""
    g = g.copy()
    small = {
        node.name
        for node in g.nodes
        if node.op_type == "Attention" and not node.domain and _head_split(g, node)[1] < least
    }
    _apply(g, {"Attention": _attention}, small)
    return g


def _head_split(g: Graph, node: onnx.NodeProto) -> tuple[int, int]:
    """Query heads and head size of an Attention node, from the Reshape that splits its query into heads."""
    producers = g.producers()
    split = producers[node.input[0]]
    while split.op_type != "Transpose":  # RotaryEmbedding, or its lowered form, is in between
        split = producers[split.input[0]]
    shape = g.constant(producers[split.input[0]].input[1])  # (b, s, heads, size)
    assert shape is not None
    return int(shape[2]), int(shape[3])


def _apply(
    g: Graph, rules: Mapping[str, Callable[[_Writer, onnx.NodeProto], None]], names: set[str] | None = None
) -> None:
    """Replace every node that has a rule (and one of the names, if given) with what the rule writes."""
    writer = _Writer(g)
    nodes: list[onnx.NodeProto] = []
    for node in g.nodes:
        rule = rules.get(node.op_type) if not node.domain and (names is None or node.name in names) else None
        if rule is None:
            nodes.append(node)
        else:
            writer.start(node)
            rule(writer, node)
            nodes += writer.nodes
    g.nodes = nodes


class _Writer:
    """Collects the nodes that replace one node; their names begin with its name."""

    def __init__(self, g: Graph):
        self.g = g
        self.nodes: list[onnx.NodeProto] = []
        self.name = ""

    def start(self, node: onnx.NodeProto) -> None:
        self.nodes = []
        self.name = node.name

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = f"{self.name}.{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output or name], name=name, **attributes))
        return output or name

    def __getattr__(self, kind: str) -> Any:
        if not kind[:1].isupper():
            raise AttributeError(kind)
        return lambda *inputs, **attributes: self.op(kind, *inputs, **attributes)


def _rms_norm(w: _Writer, node: onnx.NodeProto) -> None:
    """x / sqrt(mean(x²) + ε) · scale, with statistics in float32."""
    g = w.g
    x = w.Cast(node.input[0], to=TensorProto.FLOAT)
    epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
    mean = w.ReduceMean(w.Mul(x, x), g.ints(-1), keepdims=1)
    normal = w.Div(x, w.Sqrt(w.Add(mean, g.number(float(epsilon), "float32"))))
    w.Mul(w.Cast(normal, to=ONNX_TYPE[g.dtype]), node.input[1], output=node.output[0])


def _rotary(w: _Writer, node: onnx.NodeProto) -> None:
    """Rotate each pair (x₁, x₂), half a head apart, by its position's angle."""
    g = w.g
    x, cos_table, sin_table, positions = node.input
    half = g.weights[cos_table].tensor.shape[1]
    cos = w.Unsqueeze(w.Gather(cos_table, positions, axis=0), g.ints(1))  # (1, 1, s, half)
    sin = w.Unsqueeze(w.Gather(sin_table, positions, axis=0), g.ints(1))
    first = w.Slice(x, g.ints(0), g.ints(half), g.ints(3))
    second = w.Slice(x, g.ints(half), g.ints(2 * half), g.ints(3))
    rotated_first = w.Sub(w.Mul(first, cos), w.Mul(second, sin))
    rotated_second = w.Add(w.Mul(first, sin), w.Mul(second, cos))
    w.Concat(rotated_first, rotated_second, axis=3, output=node.output[0])


def _attention(w: _Writer, node: onnx.NodeProto) -> None:
    """softmax(q·kᵀ · scale + mask) · v, where several query heads may share a key and value head (GQA)."""
    g = w.g
    q, k, v = node.input[:3]
    mask = node.input[3] if len(node.input) > 3 else ""
    scale = next(a.f for a in node.attribute if a.name == "scale")
    group, kv_heads, size = _query_groups(g, node)
    if group > 1:  # (b, heads, s, d) → (b, kv_heads, group·s, d): the query heads of a group become rows
        q = w.Reshape(q, g.ints(0, kv_heads, -1, size))
    scores = w.MatMul(w.Mul(q, g.number(float(scale))), w.Transpose(k, perm=[0, 1, 3, 2]))
    if group > 1:
        scores = _with_heads(w, scores, kv_heads * group, k)
    if mask:
        scores = w.Add(scores, mask)
    shares = w.Softmax(scores, axis=-1)
    if group > 1:
        shares = _with_heads(w, shares, kv_heads, k)
        w.Reshape(w.MatMul(shares, v), g.ints(0, kv_heads * group, -1, size), output=node.output[0])
    else:
        w.MatMul(shares, v, output=node.output[0])


def _with_heads(w: _Writer, scores: str, heads: int, keys: str) -> str:
    """Attention scores reshaped to (1, heads, -1, number of keys)."""
    g = w.g
    shape = w.Concat(g.ints(1), g.ints(heads), g.ints(-1), w.Shape(keys, start=2, end=3), axis=0)
    return w.Reshape(scores, shape)


def _query_groups(g: Graph, node: onnx.NodeProto) -> tuple[int, int, int]:
    """Query heads per key head, key heads, and head size; (1, 0, 0) without a KV cache (towers)."""
    shape = next((v.type.tensor_type.shape for v in g.inputs if v.name.startswith("past.")), None)
    if shape is None or len(node.input) < 4:
        return 1, 0, 0
    kv_heads = shape.dim[1].dim_value
    size = shape.dim[3].dim_value
    return _head_split(g, node)[0] // kv_heads, kv_heads, size


def _scatter(w: _Writer, node: onnx.NodeProto) -> None:
    w.Concat(node.input[0], node.input[1], axis=2, output=node.output[0])


_RULES = {
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary,
    "Attention": _attention,
    "TensorScatter": _scatter,
}


def _concatenated_cache(g: Graph) -> None:
    """Declare the inputs and outputs of a decoder whose KV cache grows."""
    g.inputs = [v for v in g.inputs if v.name != "write_index"]
    for value in [*g.inputs, *g.outputs]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "capacity":
                dimension.dim_param = "past" if value.name.startswith("past.") else "total"


def _int4_to_float(g: Graph) -> None:
    """Replace INT4 weights, which opset 20 doesn't support, with float weights."""
    kept = []
    for node in g.nodes:
        weight = g.weights.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.dtype != "int4":
            kept.append(node)
            continue
        block = next(a.i for a in node.attribute if a.name == "block_size")
        name = node.output[0]
        scale = g.weights[node.input[1]].tensor
        g.weights[name] = Weight(_dequantized(weight.tensor, scale, name, block), g.dtype)
    g.nodes = kept


def _dequantized(packed: Tensor, scale: Tensor, name: str, block: int) -> Tensor:
    """Float weights (inputs, outputs) from packed INT4 with scales (inputs / block, outputs)."""
    inputs, outputs = packed.shape

    def load() -> np.ndarray:
        pairs = np.asarray(packed.load()).reshape(inputs, outputs // 2).view(np.uint8)
        values = np.empty((inputs, outputs), np.float32)
        values[:, 0::2] = _sign_extended(pairs & 15)
        values[:, 1::2] = _sign_extended(pairs >> 4)
        return values * np.repeat(np.asarray(scale.load(), np.float32), block, axis=0)

    return Tensor(name, (inputs, outputs), load)


def _sign_extended(nibbles: np.ndarray) -> np.ndarray:
    """4-bit two's complement → int8."""
    return (nibbles.astype(np.int8) ^ 8) - 8


def _inlined(g: Graph) -> Graph:
    """The same graph with its model-local functions inlined."""
    if not g.functions:
        return g
    # Without weights: the inliner needs only their names.
    graph = helper.make_graph(g.nodes, g.name, g.inputs, g.outputs)
    opsets = [helper.make_opsetid("", g.opset), helper.make_opsetid(DOMAIN, 1)]
    model = inliner.inline_local_functions(
        helper.make_model(graph, opset_imports=opsets, functions=g.functions, ir_version=g.ir_version)
    )
    g.nodes = list(model.graph.node)
    g.functions = []
    for i, node in enumerate(g.nodes):
        node.name = node.name or f"{g.name}.inlined{i}"
    return g
