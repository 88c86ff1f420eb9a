"""Target cpu: rewrites that ONNX Runtime's CPU provider runs faster than the standard graph.

float16            → float32, except for the KV cache (the provider would cast around every product)
INT4, INT8 weights → MatMulNBits
W8A8               → MatMulIntegerToFloat
tower attention    → MultiHeadAttention
decoder attention  → GroupQueryAttention
"""

from __future__ import annotations

from onnx import TensorProto

from ppllava_edge.engines.graphs.contrib_attention import cached_attention, tower_attention
from ppllava_edge.engines.graphs.contrib_products import CONTRIB, integer_products, weight_only_products
from ppllava_edge.engines.graphs.decode_step import several_logits
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.rewrite import to_float32


def for_cpu(g: Graph) -> Graph:
    """A rewritten copy of a stage's graph; its weights are still loaded when it is saved.

    Inputs and outputs keep their names.

    Raises:
        EngineError: If the decoder doesn't end as export writes it.
    """
    half_cache = any(
        v.name.startswith("past.") and v.type.tensor_type.elem_type == TensorProto.FLOAT16 for v in g.inputs
    )
    is_decoder = any(v.name == "logits" for v in g.outputs)
    g = to_float32(several_logits(g) if is_decoder else g)
    g.domains.add(CONTRIB)
    integer_products(g)
    weight_only_products(g)
    tower_attention(g)
    cached_attention(g, half_cache)
    g.prune()
    return g
