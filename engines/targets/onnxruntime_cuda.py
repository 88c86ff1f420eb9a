"""What ONNX Runtime's CUDA provider runs faster than the standard graph: rewrites that `ppllava-build --target cuda` applies.

    INT4, INT8 weights → MatMulNBits in its own layout
    W8A8               → INT8 weights with float activations (the provider has no fused INT8 x INT8 product for these graphs)
    tower attention    → MultiHeadAttention (flash attention, no transposes)
    decoder attention  → GroupQueryAttention with rotary embedding inside, over the same in-place cache
    other attention    → products and a softmax (the question tower's, which has a mask)
    RMSNormalization   → SimplifiedLayerNormalization, the name under which the provider has a kernel
    decoder            → fed by its own output (decode_graph.py)
    pooling            → what stands before the pooling kernel of our own, and what stands after it

Not run on real hardware yet (docs/limitations.md): the rewritten graphs are compared with the standard ones on the CPU provider.
"""

from __future__ import annotations

import onnx
from onnx import helper

from ppllava_edge.engines.graphs.decode_step import self_feeding
from ppllava_edge.engines.graphs.graph import DOMAIN, Graph
from ppllava_edge.engines.graphs.tensors import ONNX_TYPE, Tensor
from ppllava_edge.engines.graphs.lower import without_small_attention
from ppllava_edge.engines.plugins.weighted_pool.tensorrt_plugin import NAME
from ppllava_edge.engines.targets.onnxruntime_cpu import (
    VENDOR,
    cached_attention,
    tower_attention,
    weight_only_products,
)


def for_cuda(g: Graph, table: Tensor | None = None) -> Graph:
    """A rewritten copy of a stage's graph. table: (V, D) token embeddings, for the decoder."""
    g = g.copy()
    g.domains.add(VENDOR)
    _float_activations(g)
    weight_only_products(g, g.dtype, accuracy=0)
    tower_attention(g)
    cached_attention(g)
    g = without_small_attention(g, least=1 << 30)
    for node in g.nodes:
        if node.op_type == "RMSNormalization":
            node.op_type = "SimplifiedLayerNormalization"
    if table is not None:
        g = self_feeding(g, table)
    g.prune()
    return g


def split_at_pooling_kernel(g: Graph) -> tuple[Graph, Graph] | None:
    """pooling.onnx → (features → hidden, before the GELU; pooled → visual_tokens), between which the kernel pools. None without guidance."""
    node = next((n for n in g.nodes if n.op_type == NAME), None)
    if node is None:
        return None
    producers = g.producers()
    reshape = producers[node.input[0]]
    gelu = producers[reshape.input[0]]
    assert gelu.op_type == "Gelu"
    before, after = g.copy(), g.copy()
    before.inputs = [v for v in before.inputs if v.name == "features"]
    before.nodes = [n for n in before.nodes if n.name not in (reshape.name, gelu.name)]
    for n in before.nodes:
        for i, name in enumerate(n.output):
            n.output[i] = "hidden" if name == gelu.input[0] else name
    width = g.weights[next(n for n in reversed(g.nodes) if n.op_type == "Add").input[1]].tensor.shape[0]
    before.outputs = [helper.make_tensor_value_info("hidden", ONNX_TYPE[g.dtype], ["t", "p", width])]
    after.inputs = [helper.make_tensor_value_info(node.output[0], ONNX_TYPE[g.dtype], ["n", width])]
    _rename(after, node.output[0], "pooled")
    after.nodes = after.nodes[[n.name for n in after.nodes].index(node.name) + 1 :]
    for part in (before, after):
        part.functions = []
        part.domains.discard(DOMAIN)
        part.prune()
    return before, after


def _rename(g: Graph, old: str, new: str) -> None:
    for node in g.nodes:
        for i, name in enumerate(node.input):
            node.input[i] = new if name == old else name
    for value in g.inputs:
        value.name = new if value.name == old else value.name


def _float_activations(g: Graph) -> None:
    """Quantize and Dequantize of activations become nothing; the weights keep theirs."""
    producers, renamed, kept = g.producers(), dict[str, str](), list[onnx.NodeProto]()
    for node in g.nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        quantize = producers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantize is not None and quantize.op_type == "QuantizeLinear":
            renamed[node.output[0]] = quantize.input[0]
            continue
        kept.append(node)
    g.nodes = kept
