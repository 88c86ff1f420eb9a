"""Rewrites that change a graph's floating type."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from ppllava_edge.engines.graphs.graph import ONNX_TYPE, Graph, Weight


def to_float32(g: Graph) -> Graph:
    """A copy that computes in float32 throughout, for engines that are slow in float16. Integer weights stay as they are."""
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
    """Casts to float16 become nothing, and so do casts to float32 of what is float32 now."""
    integers = {
        v.name
        for v in g.inputs
        if v.type.tensor_type.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16)
    }
    outputs, renamed, kept = {v.name for v in g.outputs}, dict[str, str](), list[onnx.NodeProto]()
    for node in g.nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        if (
            node.op_type == "Cast"
            and node.attribute[0].i in (TensorProto.FLOAT, TensorProto.FLOAT16)
            and _is_float(g, node.input[0], integers, kept)
        ):
            if node.output[0] in outputs:
                node = helper.make_node("Identity", list(node.input), list(node.output), name=node.name)
            else:
                renamed[node.output[0]] = node.input[0]
                continue
        elif node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT16:
            node.attribute[0].i = TensorProto.FLOAT
        kept.append(node)
    g.nodes = kept


_NOT_FLOAT = (
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
)


def _is_float(g: Graph, name: str, integers: set[str], kept: list) -> bool:
    """Whether a value is floating, judged by what makes it."""
    if name in integers or name in g.constants:
        return False
    maker = next((node for node in reversed(kept) if name in node.output), None)
    if maker is None:
        return True
    if maker.op_type == "Cast":
        return maker.attribute[0].i == TensorProto.FLOAT
    return maker.op_type not in _NOT_FLOAT
