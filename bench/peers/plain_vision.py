"""A trunk's graph in the operators that every engine reads (opset 20, float32), for engines that don't know opset 24's Attention."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.rewrite import to_float32


def write_plain_vision(source: Path, output: Path) -> None:
    """Attention becomes MatMul, Softmax, MatMul; Quantize and Dequantize stay as they are."""
    g = to_float32(Graph.read(source))
    nodes: list[onnx.NodeProto] = []
    for node in g.nodes:
        if node.op_type != "Attention":
            nodes.append(node)
            continue
        (q, k, v), name = node.input[:3], node.name
        scale = g.number(next(a.f for a in node.attribute if a.name == "scale"))
        nodes += [
            helper.make_node("Transpose", [k], [f"{name}.k"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [q, f"{name}.k"], [f"{name}.qk"]),
            helper.make_node("Mul", [f"{name}.qk", scale], [f"{name}.scaled"]),
            helper.make_node("Softmax", [f"{name}.scaled"], [f"{name}.p"], axis=-1),
            helper.make_node("MatMul", [f"{name}.p", v], list(node.output)),
        ]
    g.nodes = nodes
    g.save(output, check=False)
    model = onnx.load(str(output), load_external_data=False)
    model.opset_import[0].version, model.ir_version = 20, 9
    output.write_bytes(model.SerializeToString())
