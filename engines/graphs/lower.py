"""Opset 24 → basic opset-20 operators, for engines that know no more: TensorRT 10.3 (JetPack 6), older ONNX Runtimes.

    RMSNormalization, RotaryEmbedding, Attention   → the products, sums and softmax that they stand for
    TensorScatter (in-place cache)                 → concatenation: past grows by what is new; write_index goes
    DequantizeLinear of INT4                       → float weights, made when the graph is written (opset 20 has no INT4)
    PromptGuidedPool3d                             → its function, inlined

The lowered graph computes the same, to rounding. Its cache has the length that is filled: past.i.* (1, kv_heads, past, head_size), mask
(1, 1, s, past + s).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner

from ppllava_edge.engines.graphs.graph import ONNX_TYPE, Graph, Tensor, Weight

LOWERED_OPSET, LOWERED_IR = 20, 9


def lower(g: Graph) -> Graph:
    """A lowered copy of a stage's graph; weights are still loaded when it is saved."""
    g = _inlined(g.copy())
    for node in g.nodes:
        if node.op_type == "TensorScatter" and node.input[0] not in {v.name for v in g.inputs}:
            raise AssertionError(f"{node.name}: the cache is not an input")
    _int4_to_float(g)
    _apply(g, _RULES)
    if any(v.name == "write_index" for v in g.inputs):
        _concatenated_cache(g)
    g.opset, g.ir_version = LOWERED_OPSET, LOWERED_IR
    g.prune()
    return g


def without_small_attention(g: Graph, least: int = 16) -> Graph:
    """A copy in which attention with heads smaller than `least` is products and a softmax: TensorRT has no kernel for it."""
    g = g.copy()
    small = {
        node.name
        for node in g.nodes
        if node.op_type == "Attention" and not node.domain and _head_size(g, node) < least
    }
    _apply(g, {"Attention": _attention}, small)
    return g


def _head_size(g: Graph, node: onnx.NodeProto) -> int:
    """Of an Attention node, from the split into heads before it."""
    producers = g.producers()
    split = producers[node.input[0]]
    while split.op_type != "Transpose":
        split = producers[split.input[0]]
    shape = g.constant(producers[split.input[0]].input[1])
    assert shape is not None
    return int(shape[3])


def _apply(
    g: Graph, rules: Mapping[str, Callable[[_Writer, onnx.NodeProto], None]], names: set[str] | None = None
) -> None:
    """Put what a rule writes in the place of each node that has one (of these names only, if given)."""
    writer, nodes = _Writer(g), list[onnx.NodeProto]()
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
    """Nodes that take the place of one: named after it, in its place."""

    def __init__(self, g: Graph):
        self.g, self.nodes, self.name = g, list[onnx.NodeProto](), ""

    def start(self, node: onnx.NodeProto) -> None:
        self.nodes, self.name = [], node.name

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = f"{self.name}.{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output or name], name=name, **attributes))
        return output or name

    def __getattr__(self, kind: str) -> Any:
        if not kind[:1].isupper():
            raise AttributeError(kind)
        return lambda *inputs, **attributes: self.op(kind, *inputs, **attributes)


def _rms_norm(w: _Writer, node: onnx.NodeProto) -> None:
    """x / sqrt(mean(x²) + ε) · scale, statistics in float32."""
    g, x = w.g, w.Cast(node.input[0], to=TensorProto.FLOAT)
    epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
    mean = w.ReduceMean(w.Mul(x, x), g.ints(-1), keepdims=1)
    normal = w.Div(x, w.Sqrt(w.Add(mean, g.number(float(epsilon), "float32"))))
    w.Mul(w.Cast(normal, to=ONNX_TYPE[g.dtype]), node.input[1], output=node.output[0])


def _rotary(w: _Writer, node: onnx.NodeProto) -> None:
    """Each pair (x₁, x₂), half a head apart, turned by its position's angle."""
    g, (x, cos, sin, positions) = w.g, node.input
    half = g.weights[cos].tensor.shape[1]
    c, s = (
        w.Unsqueeze(w.Gather(table, positions, axis=0), g.ints(1)) for table in (cos, sin)
    )  # (1, 1, s, half)
    first, second = (
        w.Slice(x, g.ints(0), g.ints(half), g.ints(3)),
        w.Slice(x, g.ints(half), g.ints(2 * half), g.ints(3)),
    )
    turned = w.Sub(w.Mul(first, c), w.Mul(second, s)), w.Add(w.Mul(first, s), w.Mul(second, c))
    w.Concat(*turned, axis=3, output=node.output[0])


def _attention(w: _Writer, node: onnx.NodeProto) -> None:
    """softmax(q·kᵀ · scale + mask) · v; a group of query heads shares a key's and value's head."""
    g, (q, k, v), mask = w.g, node.input[:3], node.input[3] if len(node.input) > 3 else ""
    scale = next(a.f for a in node.attribute if a.name == "scale")
    group, kv_heads, size = _groups(g, node)
    if group > 1:  # (b, heads, s, d) → (b, kv_heads, group·s, d): the same rows, side by side
        q = w.Reshape(q, g.ints(0, kv_heads, -1, size))
    scores = w.MatMul(w.Mul(q, g.number(float(scale))), w.Transpose(k, perm=[0, 1, 3, 2]))
    if group > 1:
        scores = w.Reshape(
            scores,
            w.Concat(g.ints(1), g.ints(kv_heads * group), g.ints(-1), w.Shape(k, start=2, end=3), axis=0),
        )
    if mask:
        scores = w.Add(scores, mask)
    shares = w.Softmax(scores, axis=-1)
    if group > 1:
        shares = w.Reshape(
            shares, w.Concat(g.ints(1), g.ints(kv_heads), g.ints(-1), w.Shape(k, start=2, end=3), axis=0)
        )
        w.Reshape(w.MatMul(shares, v), g.ints(0, kv_heads * group, -1, size), output=node.output[0])
    else:
        w.MatMul(shares, v, output=node.output[0])


def _groups(g: Graph, node: onnx.NodeProto) -> tuple[int, int, int]:
    """Query heads per key head, key heads, head size; (1, 0, 0) where all have their own (towers)."""
    producers = g.producers()
    shape = next((v.type.tensor_type.shape for v in g.inputs if v.name.startswith("past.")), None)
    if shape is None or len(node.input) < 4:
        return 1, 0, 0
    kv_heads, size = shape.dim[1].dim_value, shape.dim[3].dim_value
    split = producers[
        node.input[0]
    ]  # RotaryEmbedding (or what became of it) ← Transpose ← Reshape to (b, s, heads, size)
    while split.op_type != "Transpose":
        split = producers[split.input[0]]
    heads = g.constant(producers[split.input[0]].input[1])
    assert heads is not None
    return int(heads[2]) // kv_heads, kv_heads, size


def _scatter(w: _Writer, node: onnx.NodeProto) -> None:
    w.Concat(node.input[0], node.input[1], axis=2, output=node.output[0])


_RULES = {
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary,
    "Attention": _attention,
    "TensorScatter": _scatter,
}


def _concatenated_cache(g: Graph) -> None:
    """Interfaces of a decoder whose cache grows."""
    g.inputs = [v for v in g.inputs if v.name != "write_index"]
    for value in [*g.inputs, *g.outputs]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "capacity":
                dimension.dim_param = "past" if value.name.startswith("past.") else "total"


def _int4_to_float(g: Graph) -> None:
    """Weights that opset 20 can't store, as floats."""
    kept = []
    for node in g.nodes:
        weight = g.weights.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.dtype != "int4":
            kept.append(node)
            continue
        block = next(a.i for a in node.attribute if a.name == "block_size")
        name = node.output[0]
        g.weights[name] = Weight(
            _restored(weight.tensor, g.weights[node.input[1]].tensor, name, block), g.dtype
        )
    g.nodes = kept


def _restored(packed: Tensor, scale: Tensor, name: str, block: int) -> Tensor:
    inputs, outputs = packed.shape

    def load() -> np.ndarray:
        pairs = np.asarray(packed.load()).reshape(inputs, outputs // 2).view(np.uint8)
        values = np.empty((inputs, outputs), np.float32)
        values[:, 0::2], values[:, 1::2] = (
            (nibble.astype(np.int8) ^ 8) - 8 for nibble in (pairs & 15, pairs >> 4)
        )
        return values * np.repeat(np.asarray(scale.load(), np.float32), block, axis=0)

    return Tensor(name, (inputs, outputs), load)


def _inlined(g: Graph) -> Graph:
    """The same graph with its model-local functions written out."""
    if not g.functions:
        return g
    graph = helper.make_graph(
        g.nodes, g.name, g.inputs, g.outputs
    )  # weights stay where they are: the inliner needs only names
    opsets = [
        helper.make_opsetid("", g.opset),
        *(helper.make_opsetid(domain, 1) for domain in ("ppllava_edge",)),
    ]
    model = inliner.inline_local_functions(
        helper.make_model(graph, opset_imports=opsets, functions=g.functions, ir_version=g.ir_version)
    )
    g.nodes, g.functions = list(model.graph.node), []
    for i, node in enumerate(g.nodes):
        node.name = node.name or f"{g.name}.inlined{i}"
    return g
