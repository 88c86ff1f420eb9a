"""Checks an opened graph's inputs and outputs against the manifest, before anything is allocated."""

from __future__ import annotations

from typing import Any

from ppllava_edge.engines.backends.onnxruntime_stage import Stage
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.bundle.untrusted import printable
from ppllava_edge.engines.errors import BundleError

Shape = list[int | None]  # None: any size, or symbolic
FLOATS = ("tensor(float)", "tensor(float16)")
# Element types, where they aren't FLOATS. KV caches: DecoderInfo.kv_dtype.
ELEMENTS = {
    **dict.fromkeys(("ids", "position_ids", "write_index", "kernel", "stride"), ("tensor(int64)",)),
    **dict.fromkeys(("cosine", "weights", "q", "logits"), ("tensor(float)",)),
}
CACHES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}


def check_stage(
    name: str, pieces: list[Stage], m: Manifest, cache: str = "in place", kv_dtype: str | None = None
) -> None:
    """Compare the shapes and element types of a stage with the manifest.

    Args:
        name: The stage's name.
        pieces: Its graph, or the pieces of it in order.
        m: The bundle's manifest.
        cache: How the KV cache is updated, as in engine.json.
        kv_dtype: Type of the KV cache, as in engine.json; None: as in the manifest.

    Raises:
        BundleError: The graph doesn't match the manifest.
    """
    path = pieces[0].path
    actual = _outer_values(pieces)
    expected = stage_shapes(name, m, cache)
    for tensor, shape in expected.items():
        value = actual.get(tensor)
        if value is None:
            raise BundleError(
                f"{path} has no {tensor}, which the manifest promises; the bundle is damaged, export it again"
            )
        elements = _elements(name, tensor, kv_dtype or m.decoder.kv_dtype)
        promised = f"{' or '.join(elements)} {shape}"
        if value.type not in elements or not _fits(value.shape, shape):
            raise BundleError(
                f"{path}: {tensor} is {printable(value.type)} {printable(value.shape)}, "
                f"the manifest promises {promised}; the bundle is damaged, export it again"
            )
    extra = sorted(set(actual) - set(expected))
    if extra:
        names = printable(", ".join(extra[:4]))
        raise BundleError(
            f"{path} has inputs or outputs that the manifest doesn't know ({names}); the bundle is damaged"
        )


def stage_shapes(name: str, m: Manifest, cache: str = "in place") -> dict[str, Shape]:
    """A stage's inputs and outputs whose shapes the manifest fixes, by name.

    Args:
        name: The stage's name.
        m: The bundle's manifest.
        cache: How the KV cache is updated, as in engine.json.
    """
    if name == "decoder":
        return _decoder_shapes(m, cache)
    v = m.vision
    pixels: Shape = [None, 3, v.image_size, v.image_size]
    states: Shape = [None, v.states, v.patches + v.class_token, v.hidden_size]
    features: Shape = [None, v.patches, v.hidden_size]
    per_patch: Shape = [None, *v.grid]
    embedding: Shape = [1, m.question.embedding_size if m.question else None]
    visual_tokens: Shape = [None, m.decoder.hidden_size]
    windows: dict[str, Shape] = {"weights": per_patch, "kernel": [3], "stride": [3]}
    stages: dict[str, dict[str, Shape]] = {
        "trunk": {"pixels": pixels, "states": states},
        "temporal": {"states": states, "features": features},
        "question": {"ids": [1, None], "mask": [1, None], "q": embedding},
        "similarity": {"features": features, "q": embedding, "cosine": per_patch, "weights": per_patch},
        "pooling": {
            "features": features,
            **(windows if m.pooling.windowed else {}),
            "visual_tokens": visual_tokens,
        },
    }
    return stages[name]


def _decoder_shapes(m: Manifest, cache: str) -> dict[str, Shape]:
    d = m.decoder
    shapes: dict[str, Shape] = {
        "inputs_embeds": [1, None, d.hidden_size],
        "position_ids": [1, None],
        "mask": [1, 1, None, None],
    }
    if cache == "in place":
        shapes["write_index"] = [1]
    for layer in range(d.layers):
        for when in ("past", "present"):
            for kind in ("key", "value"):
                shapes[f"{when}.{layer}.{kind}"] = [1, d.kv_heads, None, d.head_size]
    return {**shapes, "logits": [None, d.vocab]}


def _elements(name: str, tensor: str, kv_dtype: str) -> tuple[str, ...]:
    """The element types that an input or output of a stage may have."""
    if tensor.startswith(("past.", "present.")):
        return (CACHES[kv_dtype],)
    if name == "question" and tensor == "mask":
        return ("tensor(int64)",)
    return ELEMENTS.get(tensor, FLOATS)


def _outer_values(pieces: list[Stage]) -> dict[str, Any]:
    """Inputs and outputs of all pieces, without the tensors that one piece passes to a later one."""
    passed_on = set[str]()
    values: dict[str, Any] = {}
    for i, piece in enumerate(pieces):
        later_inputs = {value.name for later in pieces[i + 1 :] for value in later.session.get_inputs()}
        outputs = piece.session.get_outputs()
        passed_on |= {value.name for value in outputs if value.name in later_inputs}
        for value in [*piece.session.get_inputs(), *outputs]:
            if value.name not in passed_on:
                values[value.name] = value
    return values


def _fits(found: Shape, expected: Shape) -> bool:
    return len(found) == len(expected) and all(e is None or f == e for f, e in zip(found, expected))
