"""A whole model into a bundle, stage after stage."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.integrity import write_manifest
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.errors import EngineError, PPLLaVAError
from ppllava_edge.engines.machine.estimate import Shape, shape_of
from ppllava_edge.engines.staging import staging_folder
from ppllava_edge.engines.targets.build import build_cpu
from ppllava_edge.export.quantisation.precision import Precision, parse_precision
from ppllava_edge.export.quantisation.quantize import LayerRecord, Plan, quantize, weight_only_plan
from ppllava_edge.export.quantisation.rounding import round_int8
from ppllava_edge.export.sources import Options, Source, open_source

EMBEDDINGS = "embed_tokens.safetensors"
Finish = Callable[[Path, Manifest, dict[str, list[LayerRecord]]], Manifest]


@dataclass(frozen=True)
class StageReport:
    """One row of the closing table."""

    stage: str
    parameters: int
    bytes: int
    seconds: float


class Progress:
    """What convert() tells while it works; the command line draws it."""

    def start(self, total_bytes: int) -> None:
        """The checkpoint is whole and this much will be written."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def wrote(self, count: int) -> None:
        """So many bytes of weights were written."""

    def step(self, what: str, done: int, of: int) -> None:
        """So much of a part of calibration is done."""


def convert(
    options: Options,
    progress: Progress | None = None,
    source: Source | None = None,
    plans: Mapping[str, Plan] | None = None,
    finish: Finish | None = None,
) -> tuple[Manifest, list[StageReport]]:
    """Write a bundle. Nothing is left behind when it fails: the bundle is written beside its place and renamed when it is whole.

    plans: what becomes of each stage's layers; None: weight-only quantisation where the precision asks for integers. finish: called when
    everything but the manifest is written; it may add files, change the manifest, or refuse by raising.
    Raises PPLLaVAError in one line for anything that the user can mend.
    """
    progress, precision = progress or Progress(), options.precision
    output = check_output(options)
    if precision.parts["kv"] == "int8" and plans is None:
        raise PPLLaVAError("kv=int8 needs calibration clips for the cache's scales: add --calibrate FOLDER")
    with contextlib.closing(source or open_source(options)) as model, work_beside(output) as work:
        graphs, records = {}, dict[str, list[LayerRecord]]()
        for name, build in model.graphs(precision).items():
            graphs[name], integer = build(), precision.integer(name)
            if plans is not None and name in plans:
                records[name] = quantize(graphs[name], plans[name])
            elif integer:
                records[name] = quantize(graphs[name], weight_only_plan(graphs[name], integer, options.block))
        progress.start(sum(g.weight_bytes for g in graphs.values()))
        model.write_tokenizers(work)  # first: quick, and may fail
        reports = []
        for name, g in graphs.items():
            progress.stage(name)
            started = time.perf_counter()
            g.save(work / f"{name}.onnx", progress.wrote)
            size = sum(path.stat().st_size for path in work.glob(f"{name}.onnx*"))
            reports.append(StageReport(name, g.parameters, size, time.perf_counter() - started))
        reports.append(write_embeddings(model, precision, work))
        manifest = model.manifest(precision)
        if precision.quantized if options.engine is None else options.engine:
            _write_engine(
                work, write_manifest(work, manifest), progress, reports, needed=bool(options.engine)
            )
        if finish:
            manifest = finish(work, manifest, records)
        manifest = write_manifest(work, manifest)
        _move_into_place(work, output, options.force)
    return manifest, reports


def predict(options: Options, frames: int | None = None) -> tuple[Shape, Shape | None]:
    """The shape of the bundle that convert() would write, and that of the same model at int4 (None if it is): nothing is loaded or written."""
    with contextlib.closing(open_source(options)) as model:
        chosen = _shape(model, options, frames)
        if options.precision.of_stage("decoder") == "int4":
            return chosen, None
        return chosen, _shape(model, replace(options, precision=parse_precision("int4"), engine=None), frames)


def _shape(model: Source, options: Options, frames: int | None) -> Shape:
    precision = options.precision
    graphs = {name: build() for name, build in model.graphs(precision).items()}
    for name, g in graphs.items():
        if integer := precision.integer(name):
            quantize(g, weight_only_plan(g, integer, options.block))
    table, newline = model.embeddings()
    each = {"fp32": 4, "fp16": 2, "int8": 1}[precision.parts["embeddings"]]
    manifest = model.manifest(precision, hash_weights=False)
    engine = precision.quantized if options.engine is None else options.engine
    return shape_of(graphs, manifest, each * (table.count + newline.count), engine, frames)


def _write_engine(
    work: Path, manifest: Manifest, progress: Progress, reports: list[StageReport], needed: bool
) -> None:
    """engines/cpu beside the graphs. Without ONNX Runtime it is left out, unless it was asked for."""
    started = time.perf_counter()
    try:
        engine = build_cpu(
            Bundle(work, manifest), lambda stage, done, of: progress.step("engine for this CPU", done, of)
        )
    except EngineError:
        if needed:
            raise
        return
    reports.append(
        StageReport(
            "engines/cpu", 0, sum(f.bytes for f in engine.files.values()), time.perf_counter() - started
        )
    )


def check_output(options: Options) -> Path:
    """The bundle's absolute path. Raises PPLLaVAError if something is there that must not be replaced."""
    output = Path(os.path.abspath(options.output))
    if output.exists() and not options.force:
        raise PPLLaVAError(
            f"{options.output} exists already; name another directory, or replace it with --force"
        )
    return output


def write_embeddings(model: Source, precision: Precision, work: Path) -> StageReport:
    """Token embeddings and image_newline: looked up by the runtime, memory-mapped, never part of a graph. INT8: a scale per row."""
    started, kind = time.perf_counter(), precision.parts["embeddings"]
    table, newline = model.embeddings()
    dtype = "float32" if kind == "fp32" else "float16"
    arrays = {"image_newline": newline.load().astype(dtype, copy=False)}
    if kind == "int8":
        rounded = round_int8(table.load().T, "float16")
        arrays |= {"embed_tokens": rounded.values.T, "embed_tokens.scale": rounded.scales}
    else:
        arrays["embed_tokens"] = table.load().astype(dtype, copy=False)
    try:
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, work / EMBEDDINGS)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from None
        raise
    os.chmod(work / EMBEDDINGS, 0o644)
    return StageReport(
        "embeddings",
        table.count + newline.count,
        (work / EMBEDDINGS).stat().st_size,
        time.perf_counter() - started,
    )


@contextlib.contextmanager
def work_beside(output: Path) -> Iterator[Path]:
    """A scratch directory beside the output; removed on any failure or interrupt. A full disk is one clear line."""
    with contextlib.ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            work = stack.enter_context(staging_folder(output))
        except OSError as error:
            raise PPLLaVAError(f"can't write beside {output}: {error.strerror}") from None
        try:
            yield work
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise PPLLaVAError(
                f"the disk that holds {output.parent} is full; nothing was left behind"
            ) from None


def _move_into_place(work: Path, output: Path, force: bool) -> None:
    work.chmod(0o755)
    if force and output.exists():
        if not output.is_dir() or (any(output.iterdir()) and not (output / "manifest.json").is_file()):
            raise PPLLaVAError(f"{output} is not a bundle; --force replaces only bundles")
        shutil.rmtree(output)
    work.rename(output)
