"""similarity.onnx: how relevant every patch is to the question, always computed in float32.

Inputs: features (T, P, C), q (1, E). Outputs: cosine (T, rows, columns), and weights (T, rows, columns): the
softmax of the scaled cosine over all T * P patches (paper: prompt-guided weights).

It is computed in float32 because the pooling softmax divides by a temperature of 0.01 and so magnifies
rounding errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from onnx import TensorProto

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.export.config.model import Model
from ppllava_edge.export.stages.layers import WeightSource, activation, layer_norm, linear, split_heads

PROJECTOR = "multi_modal_projector."
UNUSED = (
    "clip_visual_head.attention.out_proj.",
)  # tensors that upstream stores and its forward pass never uses


def build_similarity(
    g: Graph, source: WeightSource, model: Model, features_dtype: str, embedding_size: int
) -> None:
    """Write the similarity's graph.

    Args:
        g: The graph to write; its dtype must be float32.
        source: Weights by their names relative to PROJECTOR.
        model: The model's configuration.
        features_dtype: The type of the features that the vision stages output.
        embedding_size: E.
    """
    v = model.vision
    rows, columns = v.grid
    features = g.input("features", features_dtype, ["T", v.patches, v.width])
    q = g.input("q", "float32", [1, embedding_size])
    x = features if features_dtype == "float32" else g.Cast(features, to=TensorProto.FLOAT)
    x = layer_norm(g, source, x, "clip_visual_ln", v.width, v.epsilon if model.siglip else 1e-5)
    probe_attention = ""
    if model.siglip:
        embeddings, probe_attention = siglip_head(g, source, model, x)
    else:
        embeddings = linear(g, source, x, "clip_visual_projection", v.width, embedding_size, bias=False)
    cosine = g.MatMul(_normalize(g, embeddings), g.Transpose(_normalize(g, q), perm=[1, 0]))  # (T, P, 1)
    weights = patch_weights(g, source, model, cosine, probe_attention)
    for value, name in ((cosine, "cosine"), (weights, "weights")):
        g.output(g.Reshape(value, g.ints(-1, rows, columns)), name, "float32", ["T", rows, columns])


def patch_weights(g: Graph, source: WeightSource, model: Model, cosine: str, probe_attention: str) -> str:
    """Add the softmax of the scaled cosine over all patches, (T, P, 1) → (1, T * P).

    With valuew_plus the weights are multiplied by 1000 times the SigLIP head's attention, as upstream does.
    """
    flat = g.Reshape(cosine, g.ints(1, -1))
    logits = g.Mul(flat, g.Exp(_scalar(g, source, model, "logit_scale")))
    if model.siglip:
        logits = g.Add(logits, _scalar(g, source, model, "logit_bias"))
    weights = g.Softmax(logits, axis=-1)
    if model.valuew_plus:
        weights = g.Mul(g.Mul(weights, g.Reshape(probe_attention, g.ints(1, -1))), g.number(1000.0))
    return weights


def siglip_head(g: Graph, source: WeightSource, model: Model, x: str) -> tuple[str, str]:
    """Add SigLIP's attention-pooling head, applied to every patch (upstream's SiglipPoolingHead_PatchCLS).

    Each patch's own value projection replaces the pooled vector.

    Args:
        x: (T, P, C).

    Returns:
        Patch embeddings (T, P, C), and with valuew_plus the probe's attention (T, P), averaged over heads,
        otherwise "".
    """
    v, name = model.vision, "clip_visual_head"
    in_projection = _split_projection(g, source, f"{name}.attention.in_proj", v.width)
    values = _affine(g, x, *in_projection("value"))
    attention = _probe_attention(g, source, model, x, in_projection) if model.valuew_plus else ""
    y = layer_norm(g, source, values, f"{name}.layernorm", v.width, v.epsilon)
    y = activation(g, linear(g, source, y, f"{name}.mlp.fc1", v.width, v.mlp), v.activation)
    return g.Add(values, linear(g, source, y, f"{name}.mlp.fc2", v.mlp, v.width)), attention


def _probe_attention(
    g: Graph, source: WeightSource, model: Model, x: str, in_projection: Callable[[str], tuple[str, str]]
) -> str:
    """The attention of SigLIP's learned probe over the patches of each frame, averaged over heads: (T, P)."""
    v = model.vision
    head_size = v.width // v.heads
    query_weights = in_projection("query")
    key_weights = in_projection("key")
    probe = g.weight(source("clip_visual_head.probe", 1, 1, v.width))
    query = g.Reshape(_affine(g, probe, *query_weights), g.ints(1, v.heads, head_size, 1))
    keys = split_heads(g, _affine(g, x, *key_weights), v.heads, head_size)
    scores = g.MatMul(keys, g.Mul(query, g.number(1 / math.sqrt(head_size))))  # (T, heads, P, 1)
    return g.Squeeze(g.ReduceMean(g.Softmax(scores, axis=2), g.ints(1), keepdims=0), g.ints(-1))


def _split_projection(
    g: Graph, source: WeightSource, name: str, width: int
) -> Callable[[str], tuple[str, str]]:
    """Return a function that registers the query, key or value part of a fused projection: (weight, bias)."""
    weight = source(f"{name}_weight", 3 * width, width)
    bias = source(f"{name}_bias", 3 * width)

    def part(label: str) -> tuple[str, str]:
        start = ("query", "key", "value").index(label) * width
        rows = slice(start, start + width)
        part_weight = weight.map(lambda fused: fused[rows].T, (width, width), f".{label}")
        part_bias = bias.map(lambda fused: fused[rows], (width,), f".{label}")
        return g.weight(part_weight), g.weight(part_bias)

    return part


def _affine(g: Graph, x: str, weight: str, bias: str) -> str:
    return g.Add(g.MatMul(x, weight), bias)


def _scalar(g: Graph, source: WeightSource, model: Model, name: str) -> str:
    shape = (1,) if model.siglip else ()  # CLIP checkpoints store a scalar, SigLIP's a vector of one
    return g.weight(source(name, *shape))


def _normalize(g: Graph, x: str) -> str:
    return g.Div(x, g.ReduceL2(x, g.ints(-1), keepdims=1))
