"""The pooling graph for engines with the pooling plugin: fixed windows, and the GELU fused into the node."""

from __future__ import annotations

import onnx
from onnx import helper

from ppllava_edge.engines.bundle.windows import Triple
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.graphs.graph import DOMAIN, Graph
from ppllava_edge.engines.plugins.weighted_pool.tensorrt_plugin import NAME, NAMESPACE, VERSION


def with_plugin(g: Graph, kernel: Triple, stride: Triple) -> Graph:
    """A copy of pooling.onnx in which PromptGuidedPool3d is the plugin's node.

    Kernel, stride and GELU become attributes. The model-local function behind the node is dropped, so only an
    engine with the plugin can open the graph.

    Args:
        g: The pooling stage.
        kernel, stride: Windows along frames, rows and columns.

    Raises:
        EngineError: If the pooling is not guided by the question, and so has no such node.
    """
    g = g.copy()
    node = next((n for n in g.nodes if n.op_type == NAME), None)
    if node is None:
        raise EngineError(f"{g.name} has no {NAME}: this pooling is not guided by the question")
    fused = _take_gelu(g, node)
    plugin = helper.make_node(
        NAME,
        list(node.input[:2]),
        list(node.output),
        name=node.name,
        domain=DOMAIN,
        kernel=list(kernel),
        stride=list(stride),
        temperature=next(a.f for a in node.attribute if a.name == "temperature"),
        gelu=int(fused),
        plugin_namespace=NAMESPACE,
        plugin_version=VERSION,
    )
    g.nodes[g.nodes.index(node)] = plugin
    g.inputs = [v for v in g.inputs if v.name not in ("kernel", "stride")]
    g.functions = []
    g.domains.add(DOMAIN)
    g.prune()
    return g


def _take_gelu(g: Graph, node: onnx.NodeProto) -> bool:
    """Bypass the exact GELU in front of a pooling node if nothing else reads it; False if there is none."""
    producers = g.producers()
    reshape = producers[node.input[0]]
    gelu = producers.get(reshape.input[0])
    if gelu is None or gelu.op_type != "Gelu" or _is_approximate(gelu):
        return False
    if len(g.consumers()[gelu.output[0]]) != 1:
        return False
    reshape.input[0] = gelu.input[0]
    return True


def _is_approximate(gelu: onnx.NodeProto) -> bool:
    return any(a.name == "approximate" and a.s == b"tanh" for a in gelu.attribute)
