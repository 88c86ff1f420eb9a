"""temporal.onnx: the branching temporal adapter over all frames of one clip (BT-Adapter).

Input: states (T, S, P+1, C). Output: features (T, P, C) = (trunk + branch) / 2.

A branch of (temporal attention, spatial layer) pairs runs parallel to the last trunk layers. It reads the
trunk's states and never changes them. Upstream never uses the result of the last pair, so that pair is left
out.
"""

from __future__ import annotations

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.export.config.model import Vision
from ppllava_edge.export.stages import layers
from ppllava_edge.export.stages.layers import WeightSource, layer_norm, linear, self_attention


def build_temporal(g: Graph, source: WeightSource, vision: Vision) -> None:
    """Write the temporal adapter's graph. Weight names are relative to trunk.TOWER."""
    v = vision
    assert v.max_frames is not None
    states = g.input("states", g.dtype, ["T", v.states, v.patches + 1, v.width])
    frames = g.Shape(states, start=0, end=1)
    patches = token = trunk = ""
    for pair in range(v.states):
        with g.scope(f"pair{pair}"):
            trunk, trunk_token = _trunk_state(g, v, states, pair)
            if pair == 0:
                patches, token = enter_branch(g, source, v, trunk, trunk_token, frames)
            else:
                patches = g.Add(trunk, patches)
                token = g.Add(trunk_token, token)
            patches = attend_over_time(g, source, v, patches, f"btadapter_T_layers.{pair}")
            name = f"btadapter_S_layers.{pair}"
            is_last = pair == v.states - 1
            patches, token = attend_over_space(g, source, v, patches, token, frames, name, is_last)
    g.output(g.Mul(g.Add(trunk, patches), g.number(0.5)), "features", g.dtype, ["T", v.patches, v.width])


def enter_branch(
    g: Graph, source: WeightSource, v: Vision, trunk: str, trunk_token: str, frames: str
) -> tuple[str, str]:
    """Add the branch's first input.

    Args:
        trunk: Patches of the trunk's first state, (T, P, C).
        trunk_token: Its class token, averaged over frames, (1, 1, C).
        frames: T, as a vector of one element.

    Returns:
        Patches with position and time embeddings (T, P, C), and the branch's class token (1, 1, C).
    """
    positions = g.weight(source("embeddings.position_embedding.weight", v.patches + 1, v.width))
    times = g.weight(source("btadapter_time_embed.weight", v.max_frames, v.width))
    times = g.Unsqueeze(g.Slice(times, g.ints(0), frames, g.ints(0)), g.ints(1))  # (T, 1, C)
    patches = g.Add(g.Add(trunk, g.Slice(positions, g.ints(1), g.ints(v.patches + 1), g.ints(0))), times)
    token = g.weight(source("btadapter_cls_token", 1, 1, v.width))
    token = g.Add(token, g.Slice(positions, g.ints(0), g.ints(1), g.ints(0)))
    return patches, g.Mul(g.Add(trunk_token, token), g.number(0.5))


def attend_over_time(g: Graph, source: WeightSource, v: Vision, patches: str, name: str) -> str:
    """Add attention along time for every patch, then a linear layer, with a residual. patches: (T, P, C)."""
    with g.scope("time"):
        x = g.Transpose(patches, perm=[1, 0, 2])  # (P, T, C)
        x = layer_norm(g, source, x, f"{name}.layer_norm1", v.width, v.epsilon)
        x = self_attention(g, source, x, f"{name}.self_attn", v.width, v.heads)
        x = linear(g, source, x, f"{name}.temporal_fc", v.width, v.width)
        return g.Add(patches, g.Transpose(x, perm=[1, 0, 2]))


def attend_over_space(
    g: Graph, source: WeightSource, v: Vision, patches: str, token: str, frames: str, name: str, is_last: bool
) -> tuple[str, str]:
    """Add a spatial transformer layer, applied to each frame.

    All frames share one class token. It attends to the patches of each frame, and its updates are averaged
    over frames.

    Args:
        patches: (T, P, C).
        token: (1, 1, C).
        frames: T, as a vector of one element.
        is_last: Whether this is the last pair, whose class token is not used and so not updated.

    Returns:
        The updated patches and class token.
    """
    with g.scope("space"):
        copies = g.Expand(token, g.Concat(frames, g.ints(1, v.width), axis=0))
        x = g.Concat(copies, patches, axis=1)  # (T, P+1, C)
        x = layer_norm(g, source, x, f"{name}.layer_norm1", v.width, v.epsilon)
        x = self_attention(g, source, x, f"{name}.self_attn", v.width, v.heads)
        residual = g.Slice(x, g.ints(1), g.ints(v.patches + 1), g.ints(1))
        patches = feed_forward(g, source, v, g.Add(patches, residual), name)
        if is_last:
            return patches, token
        return patches, feed_forward(g, source, v, g.Add(token, _mean_class_token(g, x)), name)


def feed_forward(g: Graph, source: WeightSource, v: Vision, x: str, name: str) -> str:
    """Add a layer's second norm and feed-forward, with a residual."""
    y = layer_norm(g, source, x, f"{name}.layer_norm2", v.width, v.epsilon)
    return g.Add(x, layers.feed_forward(g, source, y, f"{name}.mlp", v.width, v.mlp, v.activation))


def _trunk_state(g: Graph, v: Vision, states: str, index: int) -> tuple[str, str]:
    """One of the trunk's states: patches (T, P, C), and the class token averaged over frames (1, 1, C)."""
    state = g.Gather(states, g.integer(index), axis=1)  # (T, P+1, C)
    patches = g.Slice(state, g.ints(1), g.ints(v.patches + 1), g.ints(1))
    return patches, _mean_class_token(g, state)


def _mean_class_token(g: Graph, x: str) -> str:
    """x (T, P+1, C) → the class token averaged over frames (1, 1, C)."""
    return g.ReduceMean(g.Slice(x, g.ints(0), g.ints(1), g.ints(1)), g.ints(0), keepdims=1)
