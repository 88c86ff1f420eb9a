"""Predict an export (--dry-run): the sizes of a bundle, from shapes alone."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from ppllava_edge.engines.machine.model_shape import Shape, shape_of
from ppllava_edge.export.convert import quantized_graphs
from ppllava_edge.export.options import Options
from ppllava_edge.export.quantisation.precision import parse_precision
from ppllava_edge.export.sources.source import Source, open_source

EMBEDDING_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def predict(options: Options, frames: int | None = None) -> tuple[Shape, Shape | None]:
    """Predict the shape of the bundle that convert() would write; nothing is loaded or written.

    Args:
        options: Options of the export.
        frames: Frames of the video; None: the model's default.

    Returns:
        The bundle's shape, and the shape of the same model in int4 (None if it is int4 already).

    Raises:
        PPLLaVAError: The model can't be exported.
    """
    with contextlib.closing(open_source(options)) as model:
        shape = _shape(model, options, frames)
        if options.precision.of_stage("decoder") == "int4":
            return shape, None
        int4 = replace(options, precision=parse_precision("int4"), engine=None)
        return shape, _shape(model, int4, frames)


def _shape(model: Source, options: Options, frames: int | None) -> Shape:
    graphs, _ = quantized_graphs(model, options, {})
    table, newline = model.embeddings()
    embedding_bytes = EMBEDDING_BYTES[options.precision.parts["embeddings"]] * (table.count + newline.count)
    manifest = model.manifest(options.precision, hash_weights=False)
    return shape_of(graphs, manifest, embedding_bytes, options.writes_cpu_engine, frames)
