"""The graphs of a checkpoint's stages, and the check that its tensors match those that the graphs need."""

from __future__ import annotations

import re
from collections.abc import Callable

from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import Tensor
from ppllava_edge.export.config.model import Model
from ppllava_edge.export.quantisation.precision import Precision
from ppllava_edge.export.sources.tensors import Checkpoint
from ppllava_edge.export.stages.decoder import LANGUAGE, build_decoder
from ppllava_edge.export.stages.pooling import build_pooling
from ppllava_edge.export.stages.question import build_question
from ppllava_edge.export.stages.similarity import PROJECTOR, UNUSED, build_similarity
from ppllava_edge.export.stages.temporal import build_temporal
from ppllava_edge.export.stages.trunk import TOWER, build_trunk

SHOWN_PROBLEMS = 8
DEFAULT_EMBEDDING_SIZE = 768

_LAYER = re.compile(r"(?:encoder\.layers|btadapter_[ST]_layers)\.(\d+)\.")


def stage_graphs(
    checkpoint: Checkpoint, model: Model, precision: Precision
) -> dict[str, Callable[[], Graph]]:
    """Return a function per stage that builds its graph, in the order in which stages run."""
    features_type = precision.float_type("trunk")
    tower = checkpoint.source(TOWER)
    projector = checkpoint.source(PROJECTOR)
    v, question, size = model.vision, model.question, embedding_size(checkpoint, model)
    writers: dict[str, Callable[[Graph], None]] = {"trunk": lambda g: build_trunk(g, tower, v)}
    if v.adapter_depth:
        writers["temporal"] = lambda g: build_temporal(g, tower, v)
    if question is not None:
        full, shapes = checkpoint.source(), checkpoint.shapes
        writers["question"] = lambda g: build_question(g, full, shapes, question, model.siglip, size)
        writers["similarity"] = lambda g: build_similarity(g, projector, model, features_type, size)
    writers["pooling"] = lambda g: build_pooling(g, projector, model, features_type)
    writers["decoder"] = lambda g: build_decoder(g, checkpoint.source(LANGUAGE), model.decoder)

    def builder(name: str) -> Callable[[], Graph]:
        def build() -> Graph:
            g = Graph(name, precision.float_type(name))
            writers[name](g)
            return g

        return build

    return {name: builder(name) for name in writers}


def embeddings(checkpoint: Checkpoint, model: Model) -> tuple[Tensor, Tensor]:
    """Return the token embeddings (V, D) and image_newline (D), not loaded."""
    d = model.decoder
    table = checkpoint.source(LANGUAGE)("model.embed_tokens.weight", d.vocab, d.width)
    newline = checkpoint.source()("image_newline", d.width)
    return table, newline


def embedding_size(checkpoint: Checkpoint, model: Model) -> int:
    """Return E, the width in which question and patches are compared, from the checkpoint's projection."""
    if model.siglip:
        return model.vision.width
    shape = checkpoint.shapes.get(PROJECTOR + "clip_text_projection.weight", ())
    return shape[0] if len(shape) == 2 else DEFAULT_EMBEDDING_SIZE


def check_tensors(checkpoint: Checkpoint, model: Model, precision: Precision) -> None:
    """Build all graphs without loading a weight, and compare the tensors they need with the checkpoint's.

    Raises:
        PPLLaVAError: Tensors are missing, wrongly shaped or unexpected; the message names them.
    """
    for build in stage_graphs(checkpoint, model, precision).values():
        build()
    embeddings(checkpoint, model)
    unexpected = sorted(
        name
        for name in checkpoint.shapes
        if name not in checkpoint.requested and not _known_unused(name, model)
    )
    problems = sorted(set(checkpoint.problems))
    problems += [f"unexpected: {name} {list(checkpoint.shapes[name])}" for name in unexpected]
    if problems:
        shown = "; ".join(problems[:SHOWN_PROBLEMS])
        if len(problems) > SHOWN_PROBLEMS:
            shown += f"; and {len(problems) - SHOWN_PROBLEMS} more"
        raise PPLLaVAError(f"{checkpoint.folder} doesn't hold this model ({len(problems)} tensors): {shown}")


def _known_unused(name: str, model: Model) -> bool:
    """Whether upstream stores this tensor without using it: unused layers, the towers' own heads, buffers."""
    if name.startswith(TOWER):
        return _unused_in_tower(name[len(TOWER) :], model)
    if name.startswith(PROJECTOR):
        rest = name[len(PROJECTOR) :]
        if model.pooling != "ppllava":
            return rest.startswith(("clip_", "logit_"))
        return rest.startswith((*UNUSED, "clip_visual_head.probe")) or rest.endswith("position_ids")
    if model.decoder.tied and name == LANGUAGE + "lm_head.weight":
        return True
    return name.endswith(("rotary_emb.inv_freq", "position_ids"))


def _unused_in_tower(rest: str, model: Model) -> bool:
    """rest: a tensor's name relative to TOWER."""
    v = model.vision
    layer = _LAYER.match(rest)
    if layer is None:
        return rest.startswith(("post_layernorm.", "head.")) or rest.endswith("position_ids")
    if rest.startswith("encoder"):
        return v.used_layers <= int(layer[1]) < v.layers
    return v.states <= int(layer[1]) < v.adapter_depth
