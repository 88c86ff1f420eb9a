"""Layers that several stages share. Names are those of the checkpoint, so that a weight in a graph can be traced back to its tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

from ppllava_edge.engines.graphs.graph import Graph, Tensor

Source = Callable[..., Tensor]  # source("name", *shape) → Tensor; see checkpoint.Checkpoint.source


def linear(g: Graph, source: Source, x: str, name: str, inputs: int, outputs: int, bias: bool = True) -> str:
    """x (…, inputs) → (…, outputs). The weight is stored (inputs, outputs): what MatMul takes, and quantisation's K-major blocks."""
    y = g.MatMul(x, g.weight(source(f"{name}.weight", outputs, inputs).T))
    return g.Add(y, g.weight(source(f"{name}.bias", outputs))) if bias else y


def layer_norm(g: Graph, source: Source, x: str, name: str, width: int, epsilon: float) -> str:
    """LayerNorm over the last axis; statistics in float32."""
    return g.LayerNormalization(
        x,
        g.weight(source(f"{name}.weight", width)),
        g.weight(source(f"{name}.bias", width)),
        axis=-1,
        epsilon=epsilon,
    )


def rms_norm(g: Graph, source: Source, x: str, name: str, width: int, epsilon: float) -> str:
    """RMSNorm over the last axis; statistics in float32."""
    return g.RMSNormalization(x, g.weight(source(f"{name}.weight", width)), axis=-1, epsilon=epsilon)


def activation(g: Graph, x: str, kind: str) -> str:
    """The activation functions of the seeds, by their configuration names."""
    if kind == "gelu":
        return g.Gelu(x)
    if kind in ("gelu_pytorch_tanh", "gelu_new"):
        return g.Gelu(x, approximate="tanh")
    if kind == "quick_gelu":
        return g.Mul(x, g.Sigmoid(g.Mul(x, g.number(1.702))))
    if kind in ("silu", "swish"):
        return g.Mul(x, g.Sigmoid(x))
    raise ValueError(kind)


ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "silu", "swish")


def split_heads(g: Graph, x: str, heads: int, head_size: int) -> str:
    """(b, s, heads*head_size) → (b, heads, s, head_size)."""
    return g.Transpose(g.Reshape(x, g.ints(0, -1, heads, head_size)), perm=[0, 2, 1, 3])


def merge_heads(g: Graph, x: str, width: int) -> str:
    """(b, heads, s, head_size) → (b, s, width)."""
    return g.Reshape(g.Transpose(x, perm=[0, 2, 1, 3]), g.ints(0, -1, width))


def self_attention(
    g: Graph, source: Source, x: str, name: str, width: int, heads: int, mask: str = ""
) -> str:
    """Multi-head self-attention of both CLIP towers. x (b, s, width); mask: additive, (1, 1, s, s)."""
    q, k, v = (
        split_heads(g, linear(g, source, x, f"{name}.{part}_proj", width, width), heads, width // heads)
        for part in "qkv"
    )
    inputs = (q, k, v, mask) if mask else (q, k, v)
    y = g.Attention(*inputs, scale=1 / math.sqrt(width // heads))
    return linear(g, source, merge_heads(g, y, width), f"{name}.out_proj", width, width)


def mlp(g: Graph, source: Source, x: str, name: str, width: int, hidden: int, kind: str) -> str:
    """Linear, activation, linear: the towers' feed-forward."""
    return linear(
        g,
        source,
        activation(g, linear(g, source, x, f"{name}.fc1", width, hidden), kind),
        f"{name}.fc2",
        hidden,
        width,
    )


def transformer_layer(g: Graph, source: Source, x: str, name: str, tower, mask: str = "") -> str:
    """Pre-norm layer of CLIP and SigLIP towers. tower: a config.Tower."""
    with g.scope(name.rsplit("encoder.", 1)[-1]):
        y = layer_norm(g, source, x, f"{name}.layer_norm1", tower.width, tower.epsilon)
        x = g.Add(x, self_attention(g, source, y, f"{name}.self_attn", tower.width, tower.heads, mask))
        y = layer_norm(g, source, x, f"{name}.layer_norm2", tower.width, tower.epsilon)
        return g.Add(x, mlp(g, source, y, f"{name}.mlp", tower.width, tower.mlp, tower.activation))
