"""similarity.onnx: how much every patch has to do with the question, always in float32.

features (T, P, C), q (1, E) → cosine (T, rows, columns) and weights (T, rows, columns): the softmax of the scaled cosine over all T*P
patches (paper: prompt-guided weights). Float32, because the pooling softmax divides by 0.01 and so magnifies rounding.
"""

from __future__ import annotations

import math

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.export.config import Model
from ppllava_edge.export.stages.layers import Source, activation, layer_norm, linear

PROJECTOR = "multi_modal_projector."


def build_similarity(
    g: Graph, source: Source, model: Model, features_dtype: str, embedding_size: int
) -> None:
    """Write the graph; g.dtype must be float32. Source names are below PROJECTOR."""
    v = model.vision
    rows, columns = v.grid
    features = g.input("features", features_dtype, ["T", v.patches, v.width])
    q = g.input("q", "float32", [1, embedding_size])
    x = features if features_dtype == "float32" else g.Cast(features, to=1)
    x = layer_norm(g, source, x, "clip_visual_ln", v.width, v.epsilon if model.siglip else 1e-5)
    attention = ""
    if model.siglip:
        embeddings, attention = _siglip_head(g, source, model, x)
    else:
        embeddings = linear(g, source, x, "clip_visual_projection", v.width, embedding_size, bias=False)
    cosine = g.MatMul(_normalise(g, embeddings), g.Transpose(_normalise(g, q), perm=[1, 0]))  # (T, P, 1)
    flat = g.Reshape(cosine, g.ints(1, -1))
    logits = g.Mul(flat, g.Exp(_scalar(g, source, model, "logit_scale")))
    if model.siglip:
        logits = g.Add(logits, _scalar(g, source, model, "logit_bias"))
    weights = g.Softmax(logits, axis=-1)
    if model.valuew_plus:
        weights = g.Mul(g.Mul(weights, g.Reshape(attention, g.ints(1, -1))), g.number(1000.0))
    for value, name in ((cosine, "cosine"), (weights, "weights")):
        g.output(g.Reshape(value, g.ints(-1, rows, columns)), name, "float32", ["T", rows, columns])


def _scalar(g: Graph, source: Source, model: Model, name: str) -> str:
    shape = (1,) if model.siglip else ()  # as each family's checkpoints have it
    return g.weight(source(name, *shape))


def _normalise(g: Graph, x: str) -> str:
    return g.Div(x, g.ReduceL2(x, g.ints(-1), keepdims=1))


def _siglip_head(g: Graph, source: Source, model: Model, x: str) -> tuple[str, str]:
    """SigLIP's attention-pool head, read per patch: the value projection takes the place of the pooled vector (upstream's
    SiglipPoolingHead_PatchCLS). Returns embeddings (T, P, C) and the probe's attention, averaged over heads, (T, P)."""
    v, name = model.vision, "clip_visual_head.attention.in_proj"
    width, heads, head_size = v.width, v.heads, v.width // v.heads
    weight, bias = source(f"{name}_weight", 3 * width, width), source(f"{name}_bias", 3 * width)

    def part(i: int, label: str):
        rows = slice(i * width, (i + 1) * width)
        w = weight.map(lambda a: a[rows].T, (width, width), f".{label}")
        return g.weight(w), g.weight(bias.map(lambda a: a[rows], (width,), f".{label}"))

    values_weight, values_bias = part(2, "value")
    values = g.Add(g.MatMul(x, values_weight), values_bias)
    attention = ""
    if model.valuew_plus:
        (wq, bq), (wk, bk) = part(0, "query"), part(1, "key")
        probe = g.weight(source("clip_visual_head.probe", 1, 1, width))
        query = g.Reshape(g.Add(g.MatMul(probe, wq), bq), g.ints(1, heads, head_size, 1))
        keys = g.Transpose(
            g.Reshape(g.Add(g.MatMul(x, wk), bk), g.ints(0, -1, heads, head_size)), perm=[0, 2, 1, 3]
        )
        scores = g.MatMul(keys, g.Mul(query, g.number(1 / math.sqrt(head_size))))  # (T, heads, P, 1)
        attention = g.Squeeze(g.ReduceMean(g.Softmax(scores, axis=2), g.ints(1), keepdims=0), g.ints(-1))
    y = layer_norm(g, source, values, "clip_visual_head.layernorm", width, v.epsilon)
    y = activation(g, linear(g, source, y, "clip_visual_head.mlp.fc1", width, v.mlp), v.activation)
    return g.Add(values, linear(g, source, y, "clip_visual_head.mlp.fc2", v.mlp, width)), attention


# Tensors that upstream's modules carry and its forward pass never uses.
UNUSED = ("clip_visual_head.attention.out_proj.",)
