"""trunk.onnx: the vision tower up to its features, for each frame separately.

Input: pixels (b, 3, H, W). Output: states (b, S, P+1, C), or (b, S, P, C) for a tower without a class token.
S is 1, or with a temporal adapter the number of hidden states that its branch reads.
Layers above the features are left out.
"""

from __future__ import annotations

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.export.config.model import Vision
from ppllava_edge.export.stages.layers import WeightSource, layer_norm, transformer_layer

TOWER = "vision_tower.vision_model."


def build_trunk(g: Graph, source: WeightSource, vision: Vision) -> None:
    """Write the trunk's graph. Weight names are relative to TOWER."""
    v = vision
    pixels = g.input("pixels", g.dtype, ["b", 3, v.image_size, v.image_size])
    x = embed_patches(g, source, v, pixels)
    states = []
    for layer in range(v.used_layers):
        x = transformer_layer(g, source, x, f"encoder.layers.{layer}", v)
        if layer >= v.used_layers - v.states:
            states.append(g.Unsqueeze(x, g.ints(1)))
    output = states[0] if len(states) == 1 else g.Concat(*states, axis=1)
    g.output(output, "states", g.dtype, ["b", v.states, v.tokens, v.width])


def embed_patches(g: Graph, source: WeightSource, v: Vision, pixels: str) -> str:
    """Add the embeddings of patches, class token (if any) and positions, (b, 3, H, W) → (b, tokens, C)."""
    with g.scope("embeddings"):
        x = _patch_convolution(g, source, v, pixels)
        if v.class_token:
            x = g.Concat(_class_token(g, source, v, pixels), x, axis=1)
        x = g.Add(x, g.weight(source("embeddings.position_embedding.weight", v.tokens, v.width)))
        if v.class_token:
            x = layer_norm(g, source, x, "pre_layrnorm", v.width, v.epsilon)  # spelled so in CLIP checkpoints
        return x


def _patch_convolution(g: Graph, source: WeightSource, v: Vision, pixels: str) -> str:
    """(b, 3, H, W) → (b, P, width). SigLIP's convolution has a bias, CLIP's has none."""
    name, size = "embeddings.patch_embedding", v.patch_size
    weights = [g.weight(source(f"{name}.weight", v.width, 3, size, size))]
    if not v.class_token:
        weights.append(g.weight(source(f"{name}.bias", v.width)))
    x = g.Conv(pixels, *weights, strides=[size, size], kernel_shape=[size, size])
    return g.Transpose(g.Reshape(x, g.ints(0, 0, -1)), perm=[0, 2, 1])


def _class_token(g: Graph, source: WeightSource, v: Vision, pixels: str) -> str:
    """The class token once per frame, (b, 1, width)."""
    shape = (1, 1, v.width)
    token = g.weight(source("embeddings.class_embedding", v.width).map(lambda a: a.reshape(shape), shape))
    batch = g.Shape(pixels, start=0, end=1)
    return g.Expand(token, g.Concat(batch, g.ints(1, v.width), axis=0))
