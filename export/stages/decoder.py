"""decoder.onnx: LLaMA or Qwen2 with an in-place KV cache.

inputs_embeds (1, s, D), position_ids (1, s), write_index (1), mask (1, 1, s, capacity) additive, past.i.key/value (1, kv_heads, capacity,
head_size) → logits (1, V) of the last position, present.i.key/value. TensorScatter writes the new keys and values at write_index; bind
past and present to one buffer and nothing is copied. The cache's capacity is symbolic: the runtime fits it to a generation.
"""

from __future__ import annotations

import numpy as np

from ppllava_edge.engines.graphs.graph import Graph, Tensor
from ppllava_edge.export.config import Decoder
from ppllava_edge.export.stages.layers import Source, activation, linear, merge_heads, rms_norm, split_heads

LANGUAGE = "language_model."


def build_decoder(g: Graph, source: Source, decoder: Decoder) -> None:
    """Write the graph. Source names are below LANGUAGE."""
    d = decoder
    x = g.input("inputs_embeds", g.dtype, [1, "s", d.width])
    position_ids = g.input("position_ids", "int64", [1, "s"])
    write_index = g.input("write_index", "int64", [1])
    mask = g.input("mask", g.dtype, [1, 1, "s", "capacity"])
    cos, sin = (g.weight(table) for table in rotary_tables(d))
    for i in range(d.layers):
        with g.scope(f"layers.{i}"):
            name = f"model.layers.{i}."
            y = rms_norm(g, source, x, name + "input_layernorm", d.width, d.epsilon)
            x = g.Add(x, _attention(g, source, d, y, i, cos, sin, position_ids, write_index, mask))
            y = rms_norm(g, source, x, name + "post_attention_layernorm", d.width, d.epsilon)
            gate = linear(g, source, y, name + "mlp.gate_proj", d.width, d.mlp, bias=False)
            up = linear(g, source, y, name + "mlp.up_proj", d.width, d.mlp, bias=False)
            x = g.Add(
                x,
                linear(
                    g,
                    source,
                    g.Mul(activation(g, gate, "silu"), up),
                    name + "mlp.down_proj",
                    d.mlp,
                    d.width,
                    bias=False,
                ),
            )
    with g.scope("lm_head"):
        last = rms_norm(g, source, g.Gather(x, g.integer(-1), axis=1), "model.norm", d.width, d.epsilon)
        head = source("model.embed_tokens.weight" if d.tied else "lm_head.weight", d.vocab, d.width)
        logits = g.MatMul(
            last, g.weight(head.map(np.transpose, (d.width, d.vocab), ".head" if d.tied else ""))
        )
    g.output(g.Cast(logits, to=1), "logits", "float32", [1, d.vocab])


def rotary_tables(d: Decoder) -> tuple[Tensor, Tensor]:
    """cos and sin (context, head_size / 2) of RoPE's angles, computed in float64."""
    frequencies = d.rope_base ** (-np.arange(0, d.head_size, 2) / d.head_size)
    angles = np.outer(np.arange(d.context) / d.rope_scale, frequencies)
    return Tensor.of("rotary.cos", np.cos(angles).astype(np.float32)), Tensor.of(
        "rotary.sin", np.sin(angles).astype(np.float32)
    )


def _attention(
    g: Graph,
    source: Source,
    d: Decoder,
    x: str,
    layer: int,
    cos: str,
    sin: str,
    position_ids: str,
    write_index: str,
    mask: str,
) -> str:
    """Rotary grouped-query attention over the cache."""
    name = f"model.layers.{layer}.self_attn."
    q, k, v = (
        split_heads(
            g,
            linear(g, source, x, f"{name}{part}_proj", d.width, heads * d.head_size, bias=d.qkv_bias),
            heads,
            d.head_size,
        )
        for part, heads in (("q", d.heads), ("k", d.kv_heads), ("v", d.kv_heads))
    )
    q, k = (g.RotaryEmbedding(part, cos, sin, position_ids) for part in (q, k))
    cached = []
    for kind, new in (("key", k), ("value", v)):
        shape: list[int | str] = [1, d.kv_heads, "capacity", d.head_size]
        past, present = g.input(f"past.{layer}.{kind}", g.dtype, shape), f"present.{layer}.{kind}"
        cached.append(g.op("TensorScatter", past, new, write_index, output=present, axis=2, mode="linear"))
        g.output(present, present, g.dtype, shape)
    y = g.Attention(q, *cached, mask, scale=d.head_size**-0.5)
    return linear(
        g,
        source,
        merge_heads(g, y, d.heads * d.head_size),
        name + "o_proj",
        d.heads * d.head_size,
        d.width,
        bias=False,
    )
