"""Target cuda: rewrites that ONNX Runtime's CUDA provider runs faster than the standard graph.

    INT4, INT8 weights → MatMulNBits
    W8A8               → INT8 weights with float activations (no fused INT8 × INT8 product in the provider)
    tower attention    → MultiHeadAttention
    decoder attention  → GroupQueryAttention
    other attention    → products and a softmax (the question tower's, which has a mask)
    RMSNormalization   → SimplifiedLayerNormalization, the name under which the provider has a kernel
    decoder            → self-feeding (graphs/decode_step.py)
    pooling            → the parts before and after the pooling kernel (plugins/weighted_pool)

Not yet run on hardware (docs/limitations.md): tests compare the rewritten graphs with the standard ones on
the CPU provider.
"""

from __future__ import annotations

import onnx
from onnx import helper

from ppllava_edge.engines.graphs.contrib_attention import cached_attention, tower_attention
from ppllava_edge.engines.graphs.contrib_products import CONTRIB, weight_only_products
from ppllava_edge.engines.graphs.decode_step import self_feeding
from ppllava_edge.engines.graphs.graph import DOMAIN, Graph
from ppllava_edge.engines.graphs.lower import without_small_attention
from ppllava_edge.engines.graphs.tensors import ONNX_TYPE, Tensor
from ppllava_edge.engines.plugins.weighted_pool.tensorrt_plugin import NAME

ANY_HEAD_SIZE = 1 << 30


def for_cuda(g: Graph, table: Tensor | None = None) -> Graph:
    """A rewritten copy of a stage's graph.

    Args:
        g: The standard graph.
        table: Token embeddings (V, D), for the decoder; None for the other stages.

    Raises:
        EngineError: If the decoder doesn't end as export writes it.
    """
    g = g.copy()
    g.domains.add(CONTRIB)
    _float_activations(g)
    weight_only_products(g, g.dtype, accuracy=0)
    tower_attention(g)
    cached_attention(g)
    g = without_small_attention(g, least=ANY_HEAD_SIZE)
    for node in g.nodes:
        if node.op_type == "RMSNormalization":
            node.op_type = "SimplifiedLayerNormalization"
    if table is not None:
        g = self_feeding(g, table)
    g.prune()
    return g


def split_at_pooling_kernel(g: Graph) -> tuple[Graph, Graph] | None:
    """Split pooling.onnx around the pooling kernel.

    Returns:
        A graph features → hidden (t, p, width), before the GELU, and a graph pooled (n, width) →
        visual_tokens; None if the pooling is not guided by the question.
    """
    node = next((n for n in g.nodes if n.op_type == NAME), None)
    if node is None:
        return None
    width = g.weights[next(n for n in reversed(g.nodes) if n.op_type == "Add").input[1]].tensor.shape[0]
    before = _before_pooling(g, node, width)
    after = _after_pooling(g, node, width)
    for part in (before, after):
        part.functions = []
        part.domains.discard(DOMAIN)
        part.prune()
    return before, after


def _before_pooling(g: Graph, node: onnx.NodeProto, width: int) -> Graph:
    producers = g.producers()
    reshape = producers[node.input[0]]
    gelu = producers[reshape.input[0]]
    assert gelu.op_type == "Gelu"
    before = g.copy()
    before.inputs = [v for v in before.inputs if v.name == "features"]
    before.nodes = [n for n in before.nodes if n.name not in (reshape.name, gelu.name)]
    for n in before.nodes:
        for i, name in enumerate(n.output):
            n.output[i] = "hidden" if name == gelu.input[0] else name
    before.outputs = [helper.make_tensor_value_info("hidden", ONNX_TYPE[g.dtype], ["t", "p", width])]
    return before


def _after_pooling(g: Graph, node: onnx.NodeProto, width: int) -> Graph:
    after = g.copy()
    after.nodes = after.nodes[[n.name for n in after.nodes].index(node.name) + 1 :]
    for n in after.nodes:
        for i, name in enumerate(n.input):
            n.input[i] = "pooled" if name == node.output[0] else name
    after.inputs = [helper.make_tensor_value_info("pooled", ONNX_TYPE[g.dtype], ["n", width])]
    return after


def _float_activations(g: Graph) -> None:
    """Drop Quantize and Dequantize of activations; the weights keep theirs."""
    producers = g.producers()
    renamed: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in g.nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        quantize = producers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantize is not None and quantize.op_type == "QuantizeLinear":
            renamed[node.output[0]] = quantize.input[0]
            continue
        kept.append(node)
    g.nodes = kept
