"""A vision tower's graph for engines that don't know opset 24's Attention: opset 20, float32."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.rewrite import to_float32


def write_plain_vision(source: Path, output: Path) -> None:
    """Rewrite Attention as MatMul, Softmax, MatMul; quantised layers stay as they are.

    Args:
        source: trunk.onnx of a bundle.
        output: The graph to write, weights beside it.
    """
    graph = to_float32(Graph.read(source))
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if node.op_type == "Attention":
            nodes += _plain_attention(graph, node)
        else:
            nodes.append(node)
    graph.nodes = nodes
    graph.save(output, check=False)
    model = onnx.load(str(output), load_external_data=False)
    model.opset_import[0].version = 20
    model.ir_version = 9
    output.write_bytes(model.SerializeToString())


def _plain_attention(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    (query, key, value), name = node.input[:3], node.name
    scale = graph.number(next(a.f for a in node.attribute if a.name == "scale"))
    return [
        helper.make_node("Transpose", [key], [f"{name}.k"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", [query, f"{name}.k"], [f"{name}.qk"]),
        helper.make_node("Mul", [f"{name}.qk", scale], [f"{name}.scaled"]),
        helper.make_node("Softmax", [f"{name}.scaled"], [f"{name}.p"], axis=-1),
        helper.make_node("MatMul", [f"{name}.p", value], list(node.output)),
    ]
