"""question.onnx: the question tower. ids (1, L) int64, mask (1, L) int64 → q (1, E), before normalisation.

CLIP reads causally and pools at the end token; SigLIP reads both ways and pools the last position, so its input must be padded.
"""

from __future__ import annotations

import numpy as np

from ppllava_edge.engines.graphs.graph import Graph, Tensor
from ppllava_edge.export.config import Question
from ppllava_edge.export.stages.layers import Source, layer_norm, linear, transformer_layer

TOWER = "multi_modal_projector.clip_text_model."
KEPT = 20  # leading positions that stretching leaves alone


def build_question(
    g: Graph,
    source: Source,
    shapes: dict[str, tuple[int, ...]],
    question: Question,
    siglip: bool,
    embedding_size: int,
) -> None:
    """Write the graph. Source names are those of the whole checkpoint. shapes tells which position tables it has."""
    q = question
    ids, mask = g.input("ids", "int64", [1, "L"]), g.input("mask", "int64", [1, "L"])
    length = g.Shape(ids, start=1, end=2)
    with g.scope("embeddings"):
        table = g.weight(source(TOWER + "embeddings.token_embedding.weight", q.vocab, q.width))
        positions = g.Slice(g.weight(position_table(source, shapes, q)), g.ints(0), length, g.ints(0))
        x = g.Add(g.Gather(table, ids, axis=0), positions)
        attention_mask = "" if siglip else _causal_mask(g, mask, length)
    tower = TOWER + "encoder.layers."
    for i in range(q.layers):
        x = transformer_layer(g, source, x, f"{tower}{i}", q, attention_mask)
    x = layer_norm(g, source, x, TOWER + "final_layer_norm", q.width, q.epsilon)
    if siglip:
        pooled = g.Gather(x, g.integer(-1), axis=1)
        out = linear(g, source, pooled, TOWER + "head", q.width, embedding_size)
    else:
        out = linear(
            g,
            source,
            _at_end_token(g, x, ids, q),
            "multi_modal_projector.clip_text_projection",
            q.width,
            embedding_size,
            bias=False,
        )
    g.output(g.Cast(out, to=1), "q", "float32", [1, embedding_size])


def position_table(source: Source, shapes: dict[str, tuple[int, ...]], q: Question) -> Tensor:
    """The (positions, width) table: upstream keeps two when stretched, one for the first 20 rows and one, trained, for the rest."""
    first, rest = TOWER + "embeddings.position_embedding", TOWER + "embeddings.position_embedding_res"
    plain = first + ".weight"
    if not q.stretched:
        return source(plain, q.positions, q.width)
    if first in shapes or plain not in shapes:
        kept, trained = source(first, q.positions, q.width), source(rest, q.positions, q.width)
        return Tensor(first, kept.shape, lambda: np.concatenate([kept.load()[:KEPT], trained.load()[KEPT:]]))
    short = source(
        plain, (q.positions + 3 * KEPT) // 4, q.width
    )  # a plain CLIP tower that is to be stretched
    return short.map(stretch_positions, (q.positions, q.width))


def stretch_positions(table: np.ndarray) -> np.ndarray:
    """(n, width) → (4n - 60, width): the first 20 rows stay, the others are stretched fourfold by linear interpolation, and the last
    four rows go on from the final two (upstream's convert_text_position)."""
    steps = np.diff(table[KEPT:], axis=0, append=table[-1:] * 2 - table[-2:-1])
    quarters = np.arange(4, dtype=table.dtype)[:, None] / 4
    stretched = table[KEPT:, None] + steps[:, None] * quarters
    return np.concatenate([table[:KEPT], stretched.reshape(-1, table.shape[1])])


def _causal_mask(g: Graph, mask: str, length: str) -> str:
    """Additive (1, 1, L, L): position i sees j <= i where mask is 1."""
    scalar = g.Squeeze(length)
    index = g.Range(g.integer(0), scalar, g.integer(1))
    seen = g.LessOrEqual(g.Unsqueeze(index, g.ints(0)), g.Unsqueeze(index, g.ints(1)))
    seen = g.And(seen, g.Cast(mask, to=9))
    return g.Unsqueeze(g.Where(seen, g.number(0.0), g.number(-1e4)), g.ints(0, 1))


def _at_end_token(g: Graph, x: str, ids: str, q: Question) -> str:
    """x (1, L, C) → (1, C) at the end token: the largest id under the legacy rule, else the first end id (position 0 if there is none)."""
    small = g.Cast(ids, to=6)
    found = small if q.legacy_eos else g.Cast(g.Equal(ids, g.integer(q.end_id)), to=6)
    at = g.ArgMax(found, axis=1, keepdims=0)  # (1)
    return g.Squeeze(g.Gather(x, at, axis=1), g.ints(1))
