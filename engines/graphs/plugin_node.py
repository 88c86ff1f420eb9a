"""The pooling graph for engines that have the plugin: windows fixed, the projector's GELU fused into the node."""

from __future__ import annotations

import onnx
from onnx import helper

from ppllava_edge.engines.bundle.windows import Triple
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.graphs.graph import DOMAIN, Graph
from ppllava_edge.engines.plugins.weighted_pool.tensorrt_plugin import NAME, NAMESPACE, VERSION


def with_plugin(g: Graph, kernel: Triple, stride: Triple) -> Graph:
    """A copy of pooling.onnx whose PromptGuidedPool3d is a plugin's node: kernel, stride and gelu are attributes, and inputs no more.

    The function that the node stood for is dropped: only an engine with the plugin can open the graph. Raises EngineError for graphs
    without the node (poolings without guidance).
    """
    g = g.copy()
    producers, consumers = g.producers(), g.consumers()
    node = next((n for n in g.nodes if n.op_type == NAME), None)
    if node is None:
        raise EngineError(f"{g.name} has no {NAME}: this pooling is not guided by the question")
    reshape = producers[node.input[0]]
    gelu = producers.get(reshape.input[0])
    fused = (
        gelu is not None
        and gelu.op_type == "Gelu"
        and not _approximate(gelu)
        and len(consumers[gelu.output[0]]) == 1
    )
    if fused and gelu is not None:
        reshape.input[0] = gelu.input[0]
    temperature = next(a.f for a in node.attribute if a.name == "temperature")
    plugin = helper.make_node(
        NAME,
        list(node.input[:2]),
        list(node.output),
        name=node.name,
        domain=DOMAIN,
        kernel=list(kernel),
        stride=list(stride),
        temperature=temperature,
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


def _approximate(gelu: onnx.NodeProto) -> bool:
    return any(a.name == "approximate" and a.s == b"tanh" for a in gelu.attribute)
