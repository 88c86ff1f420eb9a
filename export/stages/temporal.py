"""temporal.onnx: the branching temporal adapter over all frames of one clip (BT-Adapter).

states (T, S, P+1, C) → features (T, P, C) = (trunk + branch) / 2. Beside the last trunk layers runs a branch of (temporal attention,
spatial layer) pairs; it reads the trunk's states and never writes to them. The last pair is never used, so it is not there.
"""

from __future__ import annotations

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.export.config import Vision
from ppllava_edge.export.stages.layers import Source, layer_norm, linear, mlp, self_attention


def build_temporal(g: Graph, source: Source, vision: Vision) -> None:
    """Write the graph. Source names are below trunk.TOWER."""
    v = vision
    assert v.max_frames is not None
    states = g.input("states", g.dtype, ["T", v.states, v.patches + 1, v.width])
    frames = g.Shape(states, start=0, end=1)
    patches = token = trunk = ""
    for pair in range(v.states):
        with g.scope(f"pair{pair}"):
            state = g.Gather(states, g.integer(pair), axis=1)  # (T, P+1, C)
            trunk = g.Slice(state, g.ints(1), g.ints(v.patches + 1), g.ints(1))
            trunk_token = g.ReduceMean(
                g.Slice(state, g.ints(0), g.ints(1), g.ints(1)), g.ints(0), keepdims=1
            )  # (1, 1, C)
            if pair == 0:
                patches, token = _enter(g, source, v, trunk, trunk_token, frames)
            else:
                patches, token = g.Add(trunk, patches), g.Add(trunk_token, token)
            patches = _attend_over_time(g, source, v, patches, f"btadapter_T_layers.{pair}")
            patches, token = _attend_over_space(
                g, source, v, patches, token, frames, f"btadapter_S_layers.{pair}", last=pair == v.states - 1
            )
    g.output(g.Mul(g.Add(trunk, patches), g.number(0.5)), "features", g.dtype, ["T", v.patches, v.width])


def _enter(g: Graph, source: Source, v: Vision, trunk: str, trunk_token: str, frames: str) -> tuple[str, str]:
    """The branch's first input: trunk patches with position and time embeddings, and a class token averaged over frames."""
    positions = g.weight(source("embeddings.position_embedding.weight", v.patches + 1, v.width))
    times = g.weight(source("btadapter_time_embed.weight", v.max_frames, v.width))
    times = g.Unsqueeze(g.Slice(times, g.ints(0), frames, g.ints(0)), g.ints(1))  # (T, 1, C)
    patches = g.Add(g.Add(trunk, g.Slice(positions, g.ints(1), g.ints(v.patches + 1), g.ints(0))), times)
    token = g.Add(
        g.weight(source("btadapter_cls_token", 1, 1, v.width)),
        g.Slice(positions, g.ints(0), g.ints(1), g.ints(0)),
    )
    return patches, g.Mul(g.Add(trunk_token, token), g.number(0.5))


def _attend_over_time(g: Graph, source: Source, v: Vision, patches: str, name: str) -> str:
    """patches (T, P, C): attention along time for every patch, then a linear map, residual."""
    with g.scope("time"):
        x = g.Transpose(patches, perm=[1, 0, 2])  # (P, T, C)
        x = layer_norm(g, source, x, f"{name}.layer_norm1", v.width, v.epsilon)
        x = self_attention(g, source, x, f"{name}.self_attn", v.width, v.heads)
        x = linear(g, source, x, f"{name}.temporal_fc", v.width, v.width)
        return g.Add(patches, g.Transpose(x, perm=[1, 0, 2]))


def _attend_over_space(
    g: Graph, source: Source, v: Vision, patches: str, token: str, frames: str, name: str, last: bool
) -> tuple[str, str]:
    """A spatial layer per frame. All frames share one class token: it attends in every frame, and its updates are averaged.

    The last pair's class token goes nowhere, so it is not updated there.
    """
    with g.scope("space"):
        copies = g.Expand(token, g.Concat(frames, g.ints(1, v.width), axis=0))
        x = g.Concat(copies, patches, axis=1)  # (T, P+1, C)
        x = layer_norm(g, source, x, f"{name}.layer_norm1", v.width, v.epsilon)
        x = self_attention(g, source, x, f"{name}.self_attn", v.width, v.heads)
        residual = g.Slice(x, g.ints(1), g.ints(v.patches + 1), g.ints(1))
        patches = _feed_forward(g, source, v, g.Add(patches, residual), name)
        if last:
            return patches, token
        update = g.ReduceMean(g.Slice(x, g.ints(0), g.ints(1), g.ints(1)), g.ints(0), keepdims=1)
        return patches, _feed_forward(g, source, v, g.Add(token, update), name)


def _feed_forward(g: Graph, source: Source, v: Vision, x: str, name: str) -> str:
    y = layer_norm(g, source, x, f"{name}.layer_norm2", v.width, v.epsilon)
    return g.Add(x, mlp(g, source, y, f"{name}.mlp", v.width, v.mlp, v.activation))
