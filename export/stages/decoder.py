"""decoder.onnx: LLaMA or Qwen2 with an in-place KV cache.

Inputs: inputs_embeds (1, s, D); position_ids (1, s) int64; write_index (1) int64; mask (1, 1, s, capacity),
additive; past.i.key and past.i.value (1, kv_heads, capacity, head_size) for every layer i.
Outputs: logits (1, V) float32 of the last position; present.i.key and present.i.value.

TensorScatter writes the new keys and values at write_index. If past and present are bound to one buffer,
nothing is copied. The capacity is symbolic; the runtime chooses it for each generation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import Tensor
from ppllava_edge.export.config.model import Decoder
from ppllava_edge.export.stages.layers import (
    WeightSource,
    activation,
    linear,
    merge_heads,
    rms_norm,
    split_heads,
)

LANGUAGE = "language_model."


@dataclass(frozen=True)
class StepInputs:
    """The graph inputs and tables that every layer's attention reads, by value name.

    Attributes:
        position_ids: Positions of the new tokens, (1, s).
        write_index: The first cache slot to write, (1).
        mask: Additive attention mask over the cache, (1, 1, s, capacity).
        cos: Cosines of the rotary embedding, (context, head_size / 2).
        sin: Sines of the rotary embedding, (context, head_size / 2).
    """

    position_ids: str
    write_index: str
    mask: str
    cos: str
    sin: str


def build_decoder(g: Graph, source: WeightSource, decoder: Decoder) -> None:
    """Write the decoder's graph. Weight names are relative to LANGUAGE."""
    d = decoder
    x = g.input("inputs_embeds", g.dtype, [1, "s", d.width])
    position_ids = g.input("position_ids", "int64", [1, "s"])
    write_index = g.input("write_index", "int64", [1])
    mask = g.input("mask", g.dtype, [1, 1, "s", "capacity"])
    cos, sin = (g.weight(table) for table in rotary_tables(d))
    step = StepInputs(position_ids, write_index, mask, cos, sin)
    for layer in range(d.layers):
        x = decoder_layer(g, source, d, x, layer, step)
    logits = lm_head(g, source, d, x)
    g.output(g.Cast(logits, to=TensorProto.FLOAT), "logits", "float32", [1, d.vocab])


def decoder_layer(g: Graph, source: WeightSource, d: Decoder, x: str, layer: int, step: StepInputs) -> str:
    """Add one pre-norm layer, x (1, s, width) → (1, s, width)."""
    with g.scope(f"layers.{layer}"):
        name = f"model.layers.{layer}"
        y = rms_norm(g, source, x, f"{name}.input_layernorm", d.width, d.epsilon)
        x = g.Add(x, attention(g, source, d, y, layer, step))
        y = rms_norm(g, source, x, f"{name}.post_attention_layernorm", d.width, d.epsilon)
        return g.Add(x, feed_forward(g, source, d, y, f"{name}.mlp"))


def attention(g: Graph, source: WeightSource, d: Decoder, x: str, layer: int, step: StepInputs) -> str:
    """Add rotary grouped-query attention over the KV cache, x (1, s, width) → (1, s, width)."""
    name = f"model.layers.{layer}.self_attn"
    width = d.heads * d.head_size
    q = _project(g, source, d, x, f"{name}.q_proj", d.heads)
    k = _project(g, source, d, x, f"{name}.k_proj", d.kv_heads)
    v = _project(g, source, d, x, f"{name}.v_proj", d.kv_heads)
    q = g.RotaryEmbedding(q, step.cos, step.sin, step.position_ids)
    k = g.RotaryEmbedding(k, step.cos, step.sin, step.position_ids)
    keys = _update_cache(g, d, k, f"{layer}.key", step.write_index)
    values = _update_cache(g, d, v, f"{layer}.value", step.write_index)
    y = g.Attention(q, keys, values, step.mask, scale=d.head_size**-0.5)
    return linear(g, source, merge_heads(g, y, width), f"{name}.o_proj", width, d.width, bias=False)


def feed_forward(g: Graph, source: WeightSource, d: Decoder, x: str, name: str) -> str:
    """Add the SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""
    gate = linear(g, source, x, f"{name}.gate_proj", d.width, d.mlp, bias=False)
    up = linear(g, source, x, f"{name}.up_proj", d.width, d.mlp, bias=False)
    y = g.Mul(activation(g, gate, "silu"), up)
    return linear(g, source, y, f"{name}.down_proj", d.mlp, d.width, bias=False)


def lm_head(g: Graph, source: WeightSource, d: Decoder, x: str) -> str:
    """Add the final norm and the output projection of the last position, x (1, s, width) → (1, vocab)."""
    with g.scope("lm_head"):
        last = g.Gather(x, g.integer(-1), axis=1)
        last = rms_norm(g, source, last, "model.norm", d.width, d.epsilon)
        name = "model.embed_tokens.weight" if d.tied else "lm_head.weight"
        suffix = ".head" if d.tied else ""
        weight = source(name, d.vocab, d.width).map(np.transpose, (d.width, d.vocab), suffix)
        return g.MatMul(last, g.weight(weight))


def rotary_tables(d: Decoder) -> tuple[Tensor, Tensor]:
    """Compute the rotary embedding's tables, with angles in float64.

    Returns:
        Cosines and sines, each (context, head_size / 2) float32.
    """
    frequencies = d.rope_base ** (-np.arange(0, d.head_size, 2) / d.head_size)
    angles = np.outer(np.arange(d.context) / d.rope_scale, frequencies)
    cos = Tensor.of("rotary.cos", np.cos(angles).astype(np.float32))
    sin = Tensor.of("rotary.sin", np.sin(angles).astype(np.float32))
    return cos, sin


def _project(g: Graph, source: WeightSource, d: Decoder, x: str, name: str, heads: int) -> str:
    """x (1, s, width) → (1, heads, s, head_size)."""
    y = linear(g, source, x, name, d.width, heads * d.head_size, bias=d.qkv_bias)
    return split_heads(g, y, heads, d.head_size)


def _update_cache(g: Graph, d: Decoder, new: str, name: str, write_index: str) -> str:
    """Write new keys or values (1, kv_heads, s, head_size) into the cache and return the whole cache."""
    shape: list[int | str] = [1, d.kv_heads, "capacity", d.head_size]
    past = g.input(f"past.{name}", g.dtype, shape)
    present = f"present.{name}"
    g.op("TensorScatter", past, new, write_index, output=present, axis=2, mode="linear")
    g.output(present, present, g.dtype, shape)
    return present
