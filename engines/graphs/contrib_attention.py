"""Attention as ONNX Runtime's own operators (domain com.microsoft).

tower attention    → MultiHeadAttention (flash attention, no transposes)
decoder attention  → GroupQueryAttention with rotary embedding inside, over the same in-place KV cache
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from ppllava_edge.engines.graphs.contrib_products import CONTRIB, Replacements, replace_nodes
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import Weight

Producers = dict[str, onnx.NodeProto]
Consumers = dict[str, list[onnx.NodeProto]]
GQA_HEAD_MULTIPLE = 8  # GroupQueryAttention supports no other head sizes


def tower_attention(g: Graph) -> None:
    """Attention without mask and KV cache between Transposes → MultiHeadAttention on (b, s, width)."""
    producers = g.producers()
    consumers = g.consumers()
    replacements: Replacements = {}
    for node in g.nodes:
        if node.op_type != "Attention" or node.domain or len(node.input) != 3:
            continue
        merged = _merge_of(consumers, node.output[0])
        q, k, v = (_before_split(g, producers, name) for name in node.input)
        if merged is None or q is None or k is None or v is None:
            continue
        attention = helper.make_node(
            "MultiHeadAttention",
            [q.value, k.value, v.value],
            [merged.output[0]],
            name=node.name,
            domain=CONTRIB,
            num_heads=q.heads,
            scale=_scale(node),
        )
        replacements[id(merged)] = [attention]
    replace_nodes(g, replacements)


def cached_attention(g: Graph, half: bool = False) -> None:
    """RotaryEmbedding, TensorScatter and Attention → GroupQueryAttention.

    The operator writes the KV cache in place when past and present share a buffer. It derives the number of
    filled positions from write_index and the length of inputs_embeds; mask and position_ids stay as inputs,
    unused. Graphs whose head size isn't a multiple of 8 are left as they are.

    Args:
        g: Changed in place.
        half: Keep a float16 KV cache in a float32 graph. It halves the memory and makes decoding, which reads
            all of the cache, faster; prefill is slower (docs/measurements.md).
    """
    if _head_size(g) % GQA_HEAD_MULTIPLE:
        return
    producers = g.producers()
    consumers = g.consumers()
    lengths = _sequence_lengths(g)
    replacements: Replacements = {}
    cache = set[str]()
    for node in g.nodes:
        found = _cached_attention_at(g, node, producers, consumers)
        if found is None:
            continue
        replacements[id(found.merged)] = _group_query_attention(g, found, half)
        replacements[id(found.key_scatter)] = []
        replacements[id(found.value_scatter)] = []
        for scatter in (found.key_scatter, found.value_scatter):
            cache |= {scatter.input[0], scatter.output[0]}
    replace_nodes(g, replacements)
    g.nodes = [*lengths, *g.nodes]
    if half:
        for value in [*g.inputs, *g.outputs]:
            if value.name in cache:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16


@dataclass
class _SplitHeads:
    """A value (b, s, heads * size) before it is split into heads."""

    value: str
    heads: int


@dataclass
class _CachedAttention:
    """An Attention node over the KV cache, with the nodes around it that GroupQueryAttention replaces."""

    node: onnx.NodeProto
    key_scatter: onnx.NodeProto
    value_scatter: onnx.NodeProto
    rotary: onnx.NodeProto  # rotates the query
    merged: onnx.NodeProto  # the Reshape that concatenates the heads
    query: _SplitHeads
    key: _SplitHeads
    value: _SplitHeads


def _cached_attention_at(
    g: Graph, node: onnx.NodeProto, producers: Producers, consumers: Consumers
) -> _CachedAttention | None:
    if node.op_type != "Attention" or node.domain or len(node.input) != 4:
        return None
    rotary, key_scatter, value_scatter = (producers[name] for name in node.input[:3])
    if key_scatter.op_type != "TensorScatter":
        return None  # an INT8 cache is dequantised in between, so the standard operator stays
    merged = _merge_of(consumers, node.output[0])
    query = _before_split(g, producers, rotary.input[0])
    key = _before_split(g, producers, producers[key_scatter.input[1]].input[0])
    value = _before_split(g, producers, value_scatter.input[1])
    if merged is None or query is None or key is None or value is None:
        return None
    return _CachedAttention(node, key_scatter, value_scatter, rotary, merged, query, key, value)


def _sequence_lengths(g: Graph) -> list[onnx.NodeProto]:
    """Nodes that compute total_length and last_position (int32) from write_index and inputs_embeds."""
    g.constants["i_1_last"] = helper.make_tensor("i_1_last", TensorProto.INT64, [1], [1])
    length = helper.make_node("Shape", ["inputs_embeds"], ["new_length"], name="new_length", start=1, end=2)
    total = "total_length.int64"
    last = "last_position.int64"
    return [
        length,
        helper.make_node("Add", ["write_index", "new_length"], [total], name=total),
        helper.make_node("Sub", [total, "i_1_last"], [last], name=last),
        *(_cast(f"{name}.int64", name, TensorProto.INT32) for name in ("total_length", "last_position")),
    ]


def _group_query_attention(g: Graph, found: _CachedAttention, half: bool) -> list[onnx.NodeProto]:
    """The operator, with casts around it where the KV cache is float16 in a float32 graph."""
    new = [found.query.value, found.key.value, found.value.value]
    tables = list(found.rotary.input[1:3])  # cosines and sines
    output = found.merged.output[0]
    before: list[onnx.NodeProto] = []
    after: list[onnx.NodeProto] = []
    if half:
        before = [_cast(name, f"{name}.half", TensorProto.FLOAT16) for name in new]
        after = [_cast(f"{output}.half", output, TensorProto.FLOAT, name=f"{output}.half")]
        for name in tables:
            g.weights[f"{name}.half"] = Weight(g.weights[name].tensor, "float16")
        new = [f"{name}.half" for name in new]
        tables = [f"{name}.half" for name in tables]
        output = f"{output}.half"
    past = [found.key_scatter.input[0], found.value_scatter.input[0]]
    present = [found.key_scatter.output[0], found.value_scatter.output[0]]
    attention = helper.make_node(
        "GroupQueryAttention",
        [*new, *past, "last_position", "total_length", *tables],
        [output, *present],
        name=found.node.name,
        domain=CONTRIB,
        num_heads=found.query.heads,
        kv_num_heads=found.key.heads,
        scale=_scale(found.node),
        do_rotary=1,
    )
    return [*before, attention, *after]


def _cast(source: str, target: str, dtype: int, name: str = "") -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=name or target, to=dtype)


def _scale(attention: onnx.NodeProto) -> float:
    return next(a.f for a in attention.attribute if a.name == "scale")


def _head_size(g: Graph) -> int:
    """The head size of a decoder's KV cache; 1 for a graph without one."""
    past = (v for v in g.inputs if v.name.startswith("past."))
    return next((v.type.tensor_type.shape.dim[3].dim_value for v in past), 1)


def _before_split(g: Graph, producers: Producers, name: str) -> _SplitHeads | None:
    """Follow Transpose and Reshape (b, s, heads, size) back from a value; None if there are none."""
    transpose = producers.get(name)
    if transpose is None or transpose.op_type != "Transpose":
        return None
    reshape = producers.get(transpose.input[0])
    if reshape is None or reshape.op_type != "Reshape":
        return None
    shape = g.constant(reshape.input[1])
    if shape is None or len(shape) != 4:
        return None
    return _SplitHeads(reshape.input[0], int(shape[2]))


def _merge_of(consumers: Consumers, name: str) -> onnx.NodeProto | None:
    """The Reshape after the Transpose that puts a value's heads side by side again."""
    transpose = consumers.get(name, [])
    if len(transpose) != 1 or transpose[0].op_type != "Transpose":
        return None
    reshape = consumers.get(transpose[0].output[0], [])
    return reshape[0] if len(reshape) == 1 and reshape[0].op_type == "Reshape" else None
