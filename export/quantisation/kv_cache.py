"""An INT8 KV cache: keys and values are quantised before they are written and restored before attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import ONNX_TYPE, SCALE, Tensor

CACHE_WRITE = "TensorScatter"


def cache_writes(g: Graph) -> dict[str, str]:
    """Map the name of each cache input (past) to the new keys or values that are written into it."""
    return {node.input[0]: node.input[1] for node in g.nodes if node.op_type == CACHE_WRITE}


def quantize_cache(g: Graph, scales: dict[str, float]) -> None:
    """Make a decoder's KV cache INT8.

    Args:
        g: The decoder.
        scales: Cache input name → scale.
    """
    caches = {
        name for node in g.nodes if node.op_type == CACHE_WRITE for name in (node.input[0], node.output[0])
    }
    for value in [*g.inputs, *g.outputs]:
        if value.name in caches:
            value.type.tensor_type.elem_type = ONNX_TYPE["int8"]
    nodes: list[onnx.NodeProto] = []
    restored: dict[str, str] = {}  # a cache after the write → its float values
    for node in g.nodes:
        if node.op_type == CACHE_WRITE:
            restored[node.output[0]] = _quantize_write(g, node, scales[node.input[0]], nodes)
            continue
        for i, name in enumerate(node.input):
            node.input[i] = restored.get(name, name)
        nodes.append(node)
    g.nodes = nodes


def _quantize_write(g: Graph, node: onnx.NodeProto, scale_value: float, nodes: list[onnx.NodeProto]) -> str:
    """Append the nodes of one quantised cache write; returns the name of the whole cache, restored."""
    past, new, present = node.input[0], node.input[1], node.output[0]
    scale = g.weight(Tensor.of(f"{past}{SCALE}", np.array(scale_value, np.float32)), "float32")
    zero = g.weight(Tensor.of(f"{past}.zero_point", np.array(0, np.int8)), "int8")

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    is_half = g.dtype == "float16"
    if is_half:  # scales are float32
        wide = add("Cast", [new], f"{new}.float32", to=ONNX_TYPE["float32"])
    else:
        wide = new
    node.input[1] = add("QuantizeLinear", [wide, scale, zero], f"{new}.int8")
    nodes.append(node)
    result = add("DequantizeLinear", [present, scale, zero], f"{present}.restored")
    if is_half:
        result = add("Cast", [result], f"{result}.half", to=ONNX_TYPE["float16"])
    return result
