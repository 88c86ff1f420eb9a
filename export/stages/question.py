"""question.onnx: the question tower, the text encoder of CLIP or SigLIP.

Inputs: ids (1, L) int64, mask (1, L) int64. Output: q (1, E) float32, before normalisation.

CLIP attends causally and pools at the end token. SigLIP attends in both directions and pools the last
position, so its input must be padded to full length.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import Tensor
from ppllava_edge.export.config.model import Question
from ppllava_edge.export.stages.layers import WeightSource, layer_norm, linear, transformer_layer

TOWER = "multi_modal_projector.clip_text_model."
TEXT_PROJECTION = "multi_modal_projector.clip_text_projection"
KEPT = 20  # leading positions that stretching does not change


def build_question(
    g: Graph,
    source: WeightSource,
    shapes: dict[str, tuple[int, ...]],
    question: Question,
    siglip: bool,
    embedding_size: int,
) -> None:
    """Write the question tower's graph.

    Args:
        g: The graph to write.
        source: Weights by their full names in the checkpoint.
        shapes: Name → shape of the checkpoint's tensors, which tells which position tables it has.
        question: The tower's configuration.
        siglip: Whether it is a SigLIP tower.
        embedding_size: E.
    """
    q = question
    ids = g.input("ids", "int64", [1, "L"])
    mask = g.input("mask", "int64", [1, "L"])
    length = g.Shape(ids, start=1, end=2)
    with g.scope("embeddings"):
        table = g.weight(source(TOWER + "embeddings.token_embedding.weight", q.vocab, q.width))
        positions = g.Slice(g.weight(position_table(source, shapes, q)), g.ints(0), length, g.ints(0))
        x = g.Add(g.Gather(table, ids, axis=0), positions)
        attention_mask = "" if siglip else causal_mask(g, mask, length)
    for layer in range(q.layers):
        x = transformer_layer(g, source, x, f"{TOWER}encoder.layers.{layer}", q, attention_mask)
    x = layer_norm(g, source, x, TOWER + "final_layer_norm", q.width, q.epsilon)
    if siglip:
        pooled = g.Gather(x, g.integer(-1), axis=1)
        out = linear(g, source, pooled, TOWER + "head", q.width, embedding_size)
    else:
        pooled = pool_end_token(g, x, ids, q)
        out = linear(g, source, pooled, TEXT_PROJECTION, q.width, embedding_size, bias=False)
    g.output(g.Cast(out, to=TensorProto.FLOAT), "q", "float32", [1, embedding_size])


def causal_mask(g: Graph, mask: str, length: str) -> str:
    """Add the additive attention mask (1, 1, L, L): position i sees j <= i where `mask` (1, L) is 1."""
    scalar = g.Squeeze(length)
    index = g.Range(g.integer(0), scalar, g.integer(1))
    visible = g.LessOrEqual(g.Unsqueeze(index, g.ints(0)), g.Unsqueeze(index, g.ints(1)))
    visible = g.And(visible, g.Cast(mask, to=TensorProto.BOOL))
    return g.Unsqueeze(g.Where(visible, g.number(0.0), g.number(-1e4)), g.ints(0, 1))


def pool_end_token(g: Graph, x: str, ids: str, q: Question) -> str:
    """Select the end token's state, x (1, L, C) → (1, C).

    The end token is the one with the largest id under the legacy rule, else the first with the end id, else
    position 0.
    """
    small = g.Cast(ids, to=TensorProto.INT32)
    if q.legacy_eos:
        score = small
    else:
        score = g.Cast(g.Equal(ids, g.integer(q.end_id)), to=TensorProto.INT32)
    position = g.ArgMax(score, axis=1, keepdims=0)  # (1)
    return g.Squeeze(g.Gather(x, position, axis=1), g.ints(1))


def position_table(source: WeightSource, shapes: dict[str, tuple[int, ...]], q: Question) -> Tensor:
    """Return the position embeddings, (positions, width).

    For a stretched tower upstream keeps two tables: the first 20 rows come from one, and the remaining rows
    come from the other, which was trained. A stretched tower whose checkpoint has a plain CLIP table gets
    that table, stretched here.
    """
    plain = TOWER + "embeddings.position_embedding.weight"
    first = TOWER + "embeddings.position_embedding"
    rest = TOWER + "embeddings.position_embedding_res"
    if not q.stretched:
        return source(plain, q.positions, q.width)
    if first in shapes or plain not in shapes:
        kept = source(first, q.positions, q.width)
        trained = source(rest, q.positions, q.width)
        return Tensor(first, kept.shape, lambda: np.concatenate([kept.load()[:KEPT], trained.load()[KEPT:]]))
    short = source(plain, (q.positions + 3 * KEPT) // 4, q.width)
    return short.map(stretch_positions, (q.positions, q.width))


def stretch_positions(table: np.ndarray) -> np.ndarray:
    """Stretch a table of position embeddings, (n, width) → (4n - 60, width).

    The first 20 rows stay, the others are stretched fourfold by linear interpolation, and the last four rows
    extrapolate the final two (upstream's convert_text_position).
    """
    steps = np.diff(table[KEPT:], axis=0, append=table[-1:] * 2 - table[-2:-1])
    quarters = np.arange(4, dtype=table.dtype)[:, None] / 4
    stretched = table[KEPT:, None] + steps[:, None] * quarters
    return np.concatenate([table[:KEPT], stretched.reshape(-1, table.shape[1])])
