"""Build an engine for one target from a bundle's standard graphs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import (
    Engine,
    engine_folder,
    fingerprint,
    write_engine,
)
from ppllava_edge.engines.libraries import import_onnxruntime, minor
from ppllava_edge.engines.staging import staging_folder
from ppllava_edge.engines.targets.progress import Progress, no_progress

if TYPE_CHECKING:  # these need onnx, which is only installed where engines are built
    from ppllava_edge.engines.graphs.graph import Graph
    from ppllava_edge.engines.targets.tensorrt.plan import Options

TENSORRT_TARGETS = ("rtx", "orin", "orin-jp6")
PIECE_BYTES = 1 << 30  # decoder weights per piece on the CPU, where all pieces stay open


def build(
    bundle: Bundle, target: str, options: Options | None = None, progress: Progress = no_progress
) -> tuple[Engine, list[dict[str, Any]]]:
    """Write engines/<target> into a bundle. Notes go to stderr.

    Args:
        bundle: The bundle with the standard graphs.
        target: One of select.TARGETS.
        options: Options of a TensorRT build; None: the defaults.
        progress: Called before each graph and at the end.

    Returns:
        The engine, and per file of a TensorRT build the fields of tensorrt.process.Built; no files otherwise.

    Raises:
        EngineError: If the target can't be built here.
        OSError: If the bundle can't be written.
    """
    if target not in TENSORRT_TARGETS:
        return build_onnxruntime(bundle, target, progress), []
    from ppllava_edge.engines.targets.tensorrt.builder import build_tensorrt
    from ppllava_edge.engines.targets.tensorrt.plan import Options

    engine, reports = build_tensorrt(
        bundle, target, options or Options(), progress, lambda text: click.echo(f"note: {text}", err=True)
    )
    return engine, [asdict(report) for report in reports]


def build_cpu(bundle: Bundle, progress: Progress = no_progress) -> Engine:
    """Write engines/cpu, which export does by default."""
    return build_onnxruntime(bundle, "cpu", progress)


def build_onnxruntime(bundle: Bundle, target: str, progress: Progress = no_progress) -> Engine:
    """Write engines/<target> into a bundle: its graphs, rewritten for ONNX Runtime.

    Weights are copied one by one. The engine is written to a staging folder and renamed, so it appears
    complete or not at all.

    Args:
        bundle: The bundle with the standard graphs.
        target: cpu, cuda, or lowered (opset 20, for ONNX Runtime before 1.24).
        progress: Called before each graph and at the end.

    Raises:
        EngineError: If the bundle was written by another version.
        OSError: If the bundle can't be written.
    """
    folder = engine_folder(bundle.path, target)
    folder.parent.mkdir(exist_ok=True)
    files = bundle.manifest.required_files()
    names = [file.removesuffix(".onnx") for file in files if file.endswith(".onnx")]
    stages: dict[str, tuple[str, ...]] = {}
    kv_dtype = bundle.manifest.decoder.kv_dtype
    made_by = {} if target == "lowered" else {"onnxruntime": _onnxruntime_version()}
    with staging_folder(folder) as staging:
        for done, name in enumerate(names):
            progress(name, done, len(names))
            for stage, graphs in _target_graphs(bundle, name, target).items():
                pieces = [stage] if len(graphs) == 1 else [f"{stage}-{i}" for i in range(len(graphs))]
                for piece, g in zip(pieces, graphs):
                    g.save(staging / f"{piece}.onnx", check=False)  # onnx's checker rejects contrib operators
                    kv_dtype = _cache_type(g) or kv_dtype
                stages[stage] = tuple(f"{piece}.onnx" for piece in pieces)
        engine = Engine(
            folder=folder,
            target=target,
            bundle=fingerprint(bundle.manifest),
            made_by=made_by,
            kv_dtype=kv_dtype,
            stages=stages,
            files={},
            library="onnxruntime",
            cache="concatenated" if target == "lowered" else "in place",
        )
        engine = write_engine(staging, engine)
    progress("all", len(names), len(names))
    return engine


def _target_graphs(bundle: Bundle, name: str, target: str) -> dict[str, list[Graph]]:
    """Rewrite one of the bundle's graphs: stage → graphs, several for the pieces of a large decoder."""
    from ppllava_edge.engines.graphs.graph import Graph
    from ppllava_edge.engines.graphs.lower import lower

    g = Graph.read(bundle.file(f"{name}.onnx"))
    if target == "lowered":
        return {name: [lower(g)]}
    if target == "cuda":
        return _cuda_graphs(bundle, name, g)
    assert target == "cpu", target
    return _cpu_graphs(name, g)


def _cuda_graphs(bundle: Bundle, name: str, g: Graph) -> dict[str, list[Graph]]:
    from ppllava_edge.engines.graphs.decode_step import embedding_table
    from ppllava_edge.engines.targets.onnxruntime_cuda import for_cuda, split_at_pooling_kernel

    if name == "decoder":
        return {name: [for_cuda(g, embedding_table(bundle, g.dtype))]}
    around = split_at_pooling_kernel(g) if name == "pooling" else None
    graphs = {name: [for_cuda(g)]}
    if around is not None:
        before, after = around
        graphs["pooling-before"] = [for_cuda(before)]
        graphs["pooling-after"] = [for_cuda(after)]
    return graphs


def _cpu_graphs(name: str, g: Graph) -> dict[str, list[Graph]]:
    from ppllava_edge.engines.graphs.pieces import split
    from ppllava_edge.engines.targets.onnxruntime_cpu import for_cpu

    g = for_cpu(g)
    if name != "decoder" or g.weight_bytes <= PIECE_BYTES:
        return {name: [g]}
    return {name: [piece.graph for piece in split(g, budget=PIECE_BYTES)]}


def _onnxruntime_version() -> str:
    return minor(str(import_onnxruntime().__version__))


def _cache_type(g: Graph) -> str | None:
    """The type of a decoder's KV cache; None for a graph without one."""
    from ppllava_edge.engines.graphs.tensors import TYPE_NAME

    past = (v for v in g.inputs if v.name.startswith("past."))
    return next((TYPE_NAME[v.type.tensor_type.elem_type] for v in past), None)
