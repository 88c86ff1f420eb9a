"""Convert a whole model into a bundle, stage by stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.integrity import write_manifest
from ppllava_edge.engines.bundle.manifest import MANIFEST, Manifest
from ppllava_edge.engines.bundle.manifest_parser import check_manifest, read_manifest
from ppllava_edge.engines.errors import EngineError, PPLLaVAError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.targets.build import build_cpu
from ppllava_edge.export.embeddings import EMBEDDINGS, write_embeddings
from ppllava_edge.export.options import Options
from ppllava_edge.export.output import bundle_staging, check_output, move_into_place
from ppllava_edge.export.progress import Progress
from ppllava_edge.export.quantisation.plan import LayerRecord, Plan, weight_only_plan
from ppllava_edge.export.quantisation.quantize import quantize
from ppllava_edge.export.sources.source import Source, open_source

Records = dict[str, list[LayerRecord]]  # by stage
Finish = Callable[[Path, Manifest, Records], Manifest]


@dataclass(frozen=True)
class StageReport:
    """One row of the table that ppllava-export prints.

    Attributes:
        stage: Stage or other part that was written, like "embeddings".
        parameters: Number of values in its weights.
        bytes: Its size on disk.
        seconds: Time to write it.
    """

    stage: str
    parameters: int
    bytes: int
    seconds: float


def convert(
    options: Options,
    progress: Progress | None = None,
    source: Source | None = None,
    plans: Mapping[str, Plan] | None = None,
    finish: Finish | None = None,
) -> tuple[Manifest, list[StageReport]]:
    """Write a bundle.

    The bundle is built in a staging folder beside the output and renamed when complete, so a failure leaves
    nothing behind.

    Args:
        options: Options of the export.
        progress: Callbacks.
        source: The model, closed at the end; None: open options.checkpoint.
        plans: How each stage is quantised. None: weight-only where the precision asks for integers.
        finish: Called with the folder, the manifest and the layers' records when everything but the manifest
            is written. It may add files, return a changed manifest, or raise to refuse the bundle.

    Returns:
        The manifest, and a report per stage.

    Raises:
        PPLLaVAError: The user can correct the cause: an option, the checkpoint, a full disk.
    """
    progress = progress or Progress()
    precision = options.precision
    output = check_output(options)
    if precision.parts["kv"] == "int8" and plans is None:
        raise PPLLaVAError("kv=int8 needs calibration clips for the cache's scales: add --calibrate FOLDER")
    with contextlib.closing(source or open_source(options)) as model, bundle_staging(output) as staging:
        model.write_tokenizers(staging)  # first, because it is quick and may fail, as the manifest's check
        check_manifest(model.manifest(precision, hash_weights=False))
        graphs, records = quantized_graphs(model, options, plans or {})
        progress.start(sum(g.weight_bytes for g in graphs.values()))
        reports = [_save_stage(name, g, staging, progress) for name, g in graphs.items()]
        reports.append(_save_embeddings(model, options, staging))
        manifest = model.manifest(precision)
        if options.writes_cpu_engine:
            bundle = Bundle(staging, write_manifest(staging, manifest))
            reports += _build_cpu_engine(bundle, progress, is_required=bool(options.engine))
        if finish:
            manifest = finish(staging, manifest, records)
        manifest = write_manifest(staging, manifest)
        read_manifest(staging / MANIFEST)  # raises if the runtime would refuse the bundle
        move_into_place(staging, output, options.force)
    return manifest, reports


def quantized_graphs(
    model: Source, options: Options, plans: Mapping[str, Plan]
) -> tuple[dict[str, Graph], Records]:
    """Build and quantise all graphs, without loading a weight.

    Args:
        model: The model.
        options: Precision and INT4 block size.
        plans: By stage; stages without one are quantised weight-only if their precision is an integer's.

    Returns:
        The graphs, and the records of the quantised ones, by stage.
    """
    graphs: dict[str, Graph] = {}
    records: Records = {}
    for name, build in model.graphs(options.precision).items():
        graphs[name] = build()
        integer = options.precision.integer(name)
        if name in plans:
            records[name] = quantize(graphs[name], plans[name])
        elif integer:
            records[name] = quantize(graphs[name], weight_only_plan(graphs[name], integer, options.block))
    return graphs, records


def _save_stage(name: str, g: Graph, staging: Path, progress: Progress) -> StageReport:
    progress.stage(name)
    started = time.perf_counter()
    g.save(staging / f"{name}.onnx", progress.wrote)
    size = sum(path.stat().st_size for path in staging.glob(f"{name}.onnx*"))
    return StageReport(name, g.parameters, size, time.perf_counter() - started)


def _save_embeddings(model: Source, options: Options, staging: Path) -> StageReport:
    started = time.perf_counter()
    count = write_embeddings(model, options.precision, staging)
    size = (staging / EMBEDDINGS).stat().st_size
    return StageReport("embeddings", count, size, time.perf_counter() - started)


def _build_cpu_engine(bundle: Bundle, progress: Progress, is_required: bool) -> list[StageReport]:
    """Write engines/cpu. Without ONNX Runtime it is left out, unless it is required."""
    started = time.perf_counter()
    try:
        engine = build_cpu(bundle, lambda stage, done, of: progress.step("engine for this CPU", done, of))
    except EngineError:
        if is_required:
            raise
        return []
    size = sum(file.bytes for file in engine.files.values())
    return [StageReport("engines/cpu", 0, size, time.perf_counter() - started)]
