"""Whether an opened graph takes and gives the shapes that the manifest promises: checked before anything is allocated by them."""

from __future__ import annotations

from ppllava_edge.engines.backends.onnxruntime_stage import Stage
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.errors import BundleError

Shape = list[int | None]  # None: any, or symbolic


def promised(name: str, m: Manifest, cache: str = "in place") -> dict[str, Shape]:
    """Inputs and outputs of a stage, by name, as far as the manifest fixes them. cache: as in engine.json."""
    v, d = m.vision, m.decoder
    features: Shape = [None, v.patches, v.hidden_size]
    states: Shape = [None, v.states, v.patches + v.class_token, v.hidden_size]
    patches: Shape = [None, *v.grid]
    embedding: Shape = [1, m.question.embedding_size if m.question else None]
    if name == "trunk":
        return {"pixels": [None, 3, v.image_size, v.image_size], "states": states}
    if name == "temporal":
        return {"states": states, "features": features}
    if name == "question":
        return {"ids": [1, None], "mask": [1, None], "q": embedding}
    if name == "similarity":
        return {"features": features, "q": embedding, "cosine": patches, "weights": patches}
    if name == "pooling":
        windows: dict[str, Shape] = (
            {"weights": patches, "kernel": [3], "stride": [3]} if m.pooling.windowed else {}
        )
        return {"features": features, **windows, "visual_tokens": [None, d.hidden_size]}
    of_layer: Shape = [1, d.kv_heads, None, d.head_size]
    layers = {
        f"{when}.{i}.{kind}": of_layer
        for i in range(d.layers)
        for when in ("past", "present")
        for kind in ("key", "value")
    }
    small: dict[str, Shape] = {"position_ids": [1, None], "mask": [1, 1, None, None]}
    if cache == "in place":
        small["write_index"] = [1]
    return {"inputs_embeds": [1, None, d.hidden_size], **small, **layers, "logits": [None, d.vocab]}


def check_stage(name: str, pieces: list[Stage], m: Manifest, cache: str = "in place") -> None:
    """Raise BundleError if the graph (or the pieces of it, in order) and the manifest don't belong together."""
    carried = set[str]()  # values that one piece gives and a later one takes
    found: dict[str, Shape] = {}
    where = pieces[0].path
    for i, piece in enumerate(pieces):
        later = {value.name for after in pieces[i + 1 :] for value in after.session.get_inputs()}
        given = [value for value in piece.session.get_outputs() if value.name in later]
        carried |= {value.name for value in given}
        for value in [*piece.session.get_inputs(), *piece.session.get_outputs()]:
            if value.name not in carried:
                found[value.name] = value.shape
    wanted = promised(name, m, cache)
    for tensor, want in wanted.items():
        got = found.get(tensor)
        if got is None:
            raise BundleError(
                f"{where} has no {tensor}, which the manifest promises; the bundle is damaged, export it again"
            )
        if got and (len(got) != len(want) or any(w is not None and g != w for g, w in zip(got, want))):
            raise BundleError(
                f"{where}: {tensor} is {got}, the manifest promises {want}; the bundle is damaged, export it again"
            )
    extra = sorted(set(found) - set(wanted))
    if extra:
        raise BundleError(
            f"{where} has inputs or outputs that the manifest doesn't know ({', '.join(extra[:4])}); the bundle is damaged"
        )
