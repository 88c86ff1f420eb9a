"""ppllava-build: engines for one kind of machine, from a bundle's standard graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

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

PIECE_BYTES = 1 << 30  # of a decoder's weights on the CPU: pieces are opened side by side
Tell = Callable[[str, int, int], None]  # stage, done, of how many


def build_onnxruntime(bundle: Bundle, target: str, tell: Tell = lambda stage, done, of: None) -> Engine:
    """Write engines/<target> into a bundle: its graphs rewritten for ONNX Runtime. Weights are copied one by one.

    target: cpu, cuda, or lowered (opset 20, for ONNX Runtime before 1.24). Written beside its place and renamed, so an engine is whole or not
    there.
    """
    place = engine_folder(bundle.path, target)
    place.parent.mkdir(exist_ok=True)
    with staging_folder(place) as work:
        stages: dict[str, tuple[str, ...]] = {}
        kv_dtype = bundle.manifest.decoder.kv_dtype
        names = [
            name.removesuffix(".onnx") for name in bundle.manifest.required_files() if name.endswith(".onnx")
        ]
        for done, name in enumerate(names):
            tell(name, done, len(names))
            for stage, graphs in _rewritten(bundle, name, target).items():
                files = [stage] if len(graphs) == 1 else [f"{stage}-{i}" for i in range(len(graphs))]
                for file, g in zip(files, graphs):
                    g.save(
                        work / f"{file}.onnx", check=False
                    )  # vendor operators are not known to the checker
                    kv_dtype = _cache_type(g) or kv_dtype
                stages[stage] = tuple(f"{file}.onnx" for file in files)
        made_by = {} if target == "lowered" else {"onnxruntime": minor(str(import_onnxruntime().__version__))}
        cache = "concatenated" if target == "lowered" else "in place"
        engine = Engine(
            place, target, fingerprint(bundle.manifest), made_by, kv_dtype, stages, {}, "onnxruntime", cache
        )
        engine = write_engine(work, engine)
    tell("all", len(names), len(names))
    return engine


def build_cpu(bundle: Bundle, tell: Tell = lambda stage, done, of: None) -> Engine:
    """engines/cpu, which export writes by default."""
    return build_onnxruntime(bundle, "cpu", tell)


def _rewritten(bundle: Bundle, name: str, target: str) -> dict[str, list[Any]]:
    """Stage → graphs (pieces of a large decoder) of a target, from one of the bundle's."""
    from ppllava_edge.engines.graphs.decode_step import embedding_table
    from ppllava_edge.engines.graphs.graph import Graph
    from ppllava_edge.engines.graphs.lower import lower
    from ppllava_edge.engines.graphs.pieces import split
    from ppllava_edge.engines.targets.onnxruntime_cpu import for_cpu
    from ppllava_edge.engines.targets.onnxruntime_cuda import for_cuda, split_at_pooling_kernel

    g = Graph.read(bundle.file(f"{name}.onnx"))
    if target == "lowered":
        return {name: [lower(g)]}
    if target == "cuda":
        if name == "decoder":
            return {name: [for_cuda(g, embedding_table(bundle, g.dtype))]}
        around = split_at_pooling_kernel(g) if name == "pooling" else None
        parts = {name: [for_cuda(g)]}
        return parts | (
            {"pooling-before": [for_cuda(around[0])], "pooling-after": [for_cuda(around[1])]}
            if around
            else {}
        )
    g = for_cpu(g)
    if name != "decoder" or g.weight_bytes <= PIECE_BYTES:
        return {name: [g]}
    return {name: [piece.graph for piece in split(g, budget=PIECE_BYTES)]}


def _cache_type(g: Any) -> str | None:
    from ppllava_edge.engines.graphs.graph import TYPE_NAME

    return next(
        (TYPE_NAME[v.type.tensor_type.elem_type] for v in g.inputs if v.name.startswith("past.")), None
    )


def build(
    bundle: Bundle, target: str, options: Any = None, tell: Tell = lambda stage, done, of: None
) -> tuple[Engine, list[dict[str, Any]]]:
    """Write engines/<target>; notes go to stderr. options: tensorrt_target.Options. Returns the engine, and per file of a TensorRT build what
    building it took.

    Raises EngineError in one line if the target can't be built here.
    """
    if target not in ("rtx", "orin", "orin-jp6"):
        return build_onnxruntime(bundle, target, tell), []
    from ppllava_edge.engines.targets.tensorrt import Options, build_tensorrt

    engine, made = build_tensorrt(
        bundle, target, options or Options(), tell, lambda text: click.echo(f"note: {text}", err=True)
    )
    return engine, [asdict(one) for one in made]
