"""trunk.onnx: the vision tower up to its features, one frame at a time.

pixels (b, 3, H, W) → states (b, S, P+1, C), class token included where the tower has one. S = 1, or with the temporal adapter the
states that its branch reads. Layers above the features are not there.
"""

from __future__ import annotations

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.export.config import Vision
from ppllava_edge.export.stages.layers import Source, layer_norm, transformer_layer

TOWER = "vision_tower.vision_model."


def build_trunk(g: Graph, source: Source, vision: Vision) -> None:
    """Write the graph. Source names are below TOWER."""
    v, side = vision, vision.image_size
    pixels = g.input("pixels", g.dtype, ["b", 3, side, side])
    with g.scope("embeddings"):
        filters = g.weight(
            source("embeddings.patch_embedding.weight", v.width, 3, v.patch_size, v.patch_size)
        )
        bias = () if v.class_token else (g.weight(source("embeddings.patch_embedding.bias", v.width)),)
        x = g.Conv(
            pixels,
            filters,
            *bias,
            strides=[v.patch_size, v.patch_size],
            kernel_shape=[v.patch_size, v.patch_size],
        )
        x = g.Transpose(g.Reshape(x, g.ints(0, 0, -1)), perm=[0, 2, 1])
        if v.class_token:
            token = g.weight(
                source("embeddings.class_embedding", v.width).map(
                    lambda a: a.reshape(1, 1, -1), (1, 1, v.width)
                )
            )
            batch = g.Shape(pixels, start=0, end=1)
            token = g.Expand(token, g.Concat(batch, g.ints(1, v.width), axis=0))
            x = g.Concat(token, x, axis=1)
        x = g.Add(
            x, g.weight(source("embeddings.position_embedding.weight", v.patches + v.class_token, v.width))
        )
        if v.class_token:
            x = layer_norm(g, source, x, "pre_layrnorm", v.width, v.epsilon)
    states = []
    for i in range(v.used_layers):
        x = transformer_layer(g, source, x, f"encoder.layers.{i}", v)
        if i >= v.used_layers - v.states:
            states.append(g.Unsqueeze(x, g.ints(1)))
    out = states[0] if len(states) == 1 else g.Concat(*states, axis=1)
    g.output(out, "states", g.dtype, ["b", v.states, v.patches + v.class_token, v.width])
