"""Layers that several stages share.

Weights keep their checkpoint names, so that a weight in a graph can be traced back to its tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import Tensor
from ppllava_edge.export.config.model import Tower

WeightSource = Callable[..., Tensor]  # source("name", *shape) → Tensor; see sources.tensors.Checkpoint.source

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "silu", "swish")


def transformer_layer(g: Graph, source: WeightSource, x: str, name: str, tower: Tower, mask: str = "") -> str:
    """Add one pre-norm transformer layer of a CLIP or SigLIP tower.

    Args:
        x: (b, s, width).
        name: The layer's name in the checkpoint, like "encoder.layers.0".
        mask: Additive attention mask (1, 1, s, s), or "" for none.

    Returns:
        The output, (b, s, width).
    """
    with g.scope(name.rsplit("encoder.", 1)[-1]):
        y = layer_norm(g, source, x, f"{name}.layer_norm1", tower.width, tower.epsilon)
        x = g.Add(x, self_attention(g, source, y, f"{name}.self_attn", tower.width, tower.heads, mask))
        y = layer_norm(g, source, x, f"{name}.layer_norm2", tower.width, tower.epsilon)
        return g.Add(x, feed_forward(g, source, y, f"{name}.mlp", tower.width, tower.mlp, tower.activation))


def self_attention(
    g: Graph, source: WeightSource, x: str, name: str, width: int, heads: int, mask: str = ""
) -> str:
    """Add the multi-head self-attention of the CLIP and SigLIP towers.

    Args:
        x: (b, s, width).
        mask: Additive attention mask (1, 1, s, s), or "" for none.

    Returns:
        The output, (b, s, width).
    """
    head_size = width // heads
    q, k, v = (
        split_heads(g, linear(g, source, x, f"{name}.{part}_proj", width, width), heads, head_size)
        for part in "qkv"
    )
    inputs = (q, k, v, mask) if mask else (q, k, v)
    y = g.Attention(*inputs, scale=1 / math.sqrt(head_size))
    return linear(g, source, merge_heads(g, y, width), f"{name}.out_proj", width, width)


def feed_forward(
    g: Graph, source: WeightSource, x: str, name: str, width: int, hidden: int, kind: str
) -> str:
    """Add the feed-forward of the towers: linear, activation, linear."""
    y = linear(g, source, x, f"{name}.fc1", width, hidden)
    y = activation(g, y, kind)
    return linear(g, source, y, f"{name}.fc2", hidden, width)


def linear(
    g: Graph, source: WeightSource, x: str, name: str, inputs: int, outputs: int, bias: bool = True
) -> str:
    """Add a linear layer, x (…, inputs) → (…, outputs).

    The weight is stored as (inputs, outputs), the layout that MatMul needs and that quantisation in blocks
    along the inputs needs.
    """
    y = g.MatMul(x, g.weight(source(f"{name}.weight", outputs, inputs).T))
    return g.Add(y, g.weight(source(f"{name}.bias", outputs))) if bias else y


def layer_norm(g: Graph, source: WeightSource, x: str, name: str, width: int, epsilon: float) -> str:
    """Add a LayerNorm over the last axis, with statistics in float32."""
    scale = g.weight(source(f"{name}.weight", width))
    bias = g.weight(source(f"{name}.bias", width))
    return g.LayerNormalization(x, scale, bias, axis=-1, epsilon=epsilon)


def rms_norm(g: Graph, source: WeightSource, x: str, name: str, width: int, epsilon: float) -> str:
    """Add an RMSNorm over the last axis, with statistics in float32."""
    return g.RMSNormalization(x, g.weight(source(f"{name}.weight", width)), axis=-1, epsilon=epsilon)


def activation(g: Graph, x: str, kind: str) -> str:
    """Add an activation function by its name in config.json, one of ACTIVATIONS."""
    if kind == "gelu":
        return g.Gelu(x)
    if kind in ("gelu_pytorch_tanh", "gelu_new"):
        return g.Gelu(x, approximate="tanh")
    if kind == "quick_gelu":
        return g.Mul(x, g.Sigmoid(g.Mul(x, g.number(1.702))))
    if kind in ("silu", "swish"):
        return g.Mul(x, g.Sigmoid(x))
    raise ValueError(kind)


def split_heads(g: Graph, x: str, heads: int, head_size: int) -> str:
    """Reshape (b, s, heads * head_size) → (b, heads, s, head_size)."""
    return g.Transpose(g.Reshape(x, g.ints(0, -1, heads, head_size)), perm=[0, 2, 1, 3])


def merge_heads(g: Graph, x: str, width: int) -> str:
    """Reshape (b, heads, s, head_size) → (b, s, width)."""
    return g.Reshape(g.Transpose(x, perm=[0, 2, 1, 3]), g.ints(0, -1, width))
