"""Change a graph's floating type."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import ONNX_TYPE, Weight

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_NOT_FLOAT = {
    "Shape",
    "Range",
    "Equal",
    "And",
    "LessOrEqual",
    "Less",
    "GreaterOrEqual",
    "ArgMax",
    "QuantizeLinear",
    "Not",
    "Or",
}


def to_float32(g: Graph) -> Graph:
    """A copy that computes in float32, for engines that are slow in float16. Integer weights stay."""
    g = g.copy()
    g.dtype = "float32"
    for value in [*g.inputs, *g.outputs]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for name, weight in g.weights.items():
        if weight.dtype == "float16":
            g.weights[name] = Weight(weight.tensor, "float32")
    for name, proto in g.constants.items():
        if proto.data_type == TensorProto.FLOAT16:
            array = np.asarray(g.constant(name), np.float32)
            g.constants[name] = helper.make_tensor(
                name, ONNX_TYPE["float32"], array.shape, array.tobytes(), raw=True
            )
    _drop_casts(g)
    return g


def _drop_casts(g: Graph) -> None:
    """Remove casts between floating types; casts of integers to float16 become casts to float32."""
    integers = {v.name for v in g.inputs if v.type.tensor_type.elem_type not in _FLOATS}
    outputs = {v.name for v in g.outputs}
    renamed: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in g.nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        if node.op_type == "Cast" and node.attribute[0].i in _FLOATS:
            if not _is_float(g, node.input[0], integers, kept):
                node.attribute[0].i = TensorProto.FLOAT
            elif node.output[0] in outputs:
                node = helper.make_node("Identity", list(node.input), list(node.output), name=node.name)
            else:
                renamed[node.output[0]] = node.input[0]
                continue
        kept.append(node)
    g.nodes = kept


def _is_float(g: Graph, name: str, integers: set[str], nodes: list[onnx.NodeProto]) -> bool:
    """Whether a value is floating, judged by the node that produces it."""
    if name in integers or name in g.constants:
        return False
    producer = next((node for node in reversed(nodes) if name in node.output), None)
    if producer is None:
        return True
    if producer.op_type == "Cast":
        return producer.attribute[0].i == TensorProto.FLOAT
    return producer.op_type not in _NOT_FLOAT
