"""ppllava-build: engines for one kind of machine, from a bundle's standard graphs."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from .bundle import Bundle
from .engine import Engine, engine_folder, find_engine, fingerprint, minor, write_engine
from .errors import PPLLaVAError
from .estimate import parse_size
from .ort import import_onnxruntime
from .select import TARGETS
from .terminal import Command, fail, human_bytes, progress_steps, table

PIECE_BYTES = 1 << 30  # of a decoder's weights on the CPU: pieces are opened side by side
Tell = Callable[[str, int, int], None]  # stage, done, of how many


def build_onnxruntime(bundle: Bundle, target: str, tell: Tell = lambda stage, done, of: None) -> Engine:
    """Write engines/<target> into a bundle: its graphs rewritten for ONNX Runtime. Weights are copied one by one.

    target: cpu, cuda, or lowered (opset 20, for ONNX Runtime before 1.24). Written beside its place and renamed, so an engine is whole or not
    there.
    """
    place = engine_folder(bundle.path, target)
    place.parent.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target}.", suffix=".part", dir=place.parent))
    try:
        stages: dict[str, tuple[str, ...]] = {}
        kv_dtype = bundle.manifest.decoder.kv_dtype
        names = [name.removesuffix(".onnx") for name in bundle.manifest.required_files() if name.endswith(".onnx")]
        for done, name in enumerate(names):
            tell(name, done, len(names))
            for stage, graphs in _rewritten(bundle, name, target).items():
                files = [stage] if len(graphs) == 1 else [f"{stage}-{i}" for i in range(len(graphs))]
                for file, g in zip(files, graphs):
                    g.save(work / f"{file}.onnx", check=False)  # vendor operators are not known to the checker
                    kv_dtype = _cache_type(g) or kv_dtype
                stages[stage] = tuple(f"{file}.onnx" for file in files)
        made_by = {} if target == "lowered" else {"onnxruntime": minor(str(import_onnxruntime().__version__))}
        cache = "concatenated" if target == "lowered" else "in place"
        engine = Engine(place, target, fingerprint(bundle.manifest), made_by, kv_dtype, stages, {}, "onnxruntime", cache)
        engine = write_engine(work, engine)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    tell("all", len(names), len(names))
    return engine


def build_cpu(bundle: Bundle, tell: Tell = lambda stage, done, of: None) -> Engine:
    """engines/cpu, which export writes by default."""
    return build_onnxruntime(bundle, "cpu", tell)


def _rewritten(bundle: Bundle, name: str, target: str) -> dict[str, list[Any]]:
    """Stage → graphs (pieces of a large decoder) of a target, from one of the bundle's."""
    from .cpu import for_cpu
    from .cuda import around_the_kernel, for_cuda
    from .decode_graph import embedding_table
    from .graph import Graph
    from .lower import lower
    from .pieces import split

    g = Graph.read(bundle.file(f"{name}.onnx"))
    if target == "lowered":
        return {name: [lower(g)]}
    if target == "cuda":
        if name == "decoder":
            return {name: [for_cuda(g, embedding_table(bundle, g.dtype))]}
        around = around_the_kernel(g) if name == "pooling" else None
        parts = {name: [for_cuda(g)]}
        return parts | ({"pooling-before": [for_cuda(around[0])], "pooling-after": [for_cuda(around[1])]} if around else {})
    g = for_cpu(g)
    if name != "decoder" or g.weight_bytes <= PIECE_BYTES:
        return {name: [g]}
    return {name: [piece.graph for piece in split(g, budget=PIECE_BYTES)]}


def _cache_type(g: Any) -> str | None:
    from .graph import TYPE_NAME

    return next((TYPE_NAME[v.type.tensor_type.elem_type] for v in g.inputs if v.name.startswith("past.")), None)


def build(bundle: Bundle, target: str, options: Any = None, tell: Tell = lambda stage, done, of: None) -> tuple[Engine, list[dict[str, Any]]]:
    """Write engines/<target>; notes go to stderr. options: tensorrt_target.Options. Returns the engine, and per file of a TensorRT build what
    building it took.

    Raises EngineError in one line if the target can't be built here.
    """
    if target not in ("rtx", "orin", "orin-jp6"):
        return build_onnxruntime(bundle, target, tell), []
    from .tensorrt_target import Options, build_tensorrt

    engine, made = build_tensorrt(bundle, target, options or Options(), tell, lambda text: click.echo(f"note: {text}", err=True))
    return engine, [asdict(one) for one in made]


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(TARGETS), default="cpu", show_default=True, help="Kind of machine.")
@click.option("--force", is_flag=True, help="Build it again even if it is there and fresh.")
@click.option("--capability", metavar="8.6,8.9,…", help="Compute capabilities that rtx builds for.  [default: 8.6,8.9,12.0]")
@click.option("--capacity", type=click.IntRange(16), help="Positions of the KV cache in a TensorRT engine.  [default: the usual prompt and answer]")
@click.option("--frames", type=click.IntRange(1), help="Usual length of a clip.  [default: the model's]")
@click.option("--plugin", type=click.Choice(("auto", "none", "python", "aot")), default="auto", show_default=True, help="The pooling kernel in TensorRT.")
@click.option("--profiles", type=click.IntRange(1, 2), default=2, show_default=True, help="Of a TensorRT decoder: prefill and one token, or one for both.")
@click.option("--piece", metavar="SIZE", help="Most weights of a decoder in one TensorRT engine.  [default: 512MB]")
@click.option("--workspace", metavar="SIZE", help="Most scratch memory of a TensorRT engine.")
@click.option("--level", type=click.IntRange(0, 5), default=3, show_default=True, help="TensorRT's optimisation level.")
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON.")
def main(
    bundle: Path, target: str, force: bool, capability: str | None, capacity: int | None, frames: int | None, plugin: str, profiles: int, piece: str | None,
    workspace: str | None, level: int, as_json: bool,
) -> None:  # fmt: skip
    """Write an engine for TARGET into BUNDLE. The runtime opens it where it fits, and the standard graphs everywhere else.

    \b
    cpu, cuda   ONNX Runtime, with the rewrites that it rewards
    lowered     ONNX Runtime before 1.24 (Python 3.10): basic opset-20 operators
    rtx         TensorRT-RTX, ahead of time, on any machine: no GPU is needed
    orin        TensorRT 10.15 or later (JetPack 7), on the machine itself; any GPU with full TensorRT
    orin-jp6    TensorRT 10.3 (JetPack 6), on the machine itself
    """
    try:
        import onnx  # noqa: F401
    except ImportError:
        fail("building needs the package onnx: pip install 'ppllava-edge[export]'")
    from .tensorrt_target import Options

    options = Options(capacity=capacity, frames=frames, plugin=plugin, decoder_profiles=profiles, level=level)
    if capability:
        options = replace(options, capabilities=_capabilities(capability))
    if piece:
        options = replace(options, piece_bytes=int(parse_size(piece)))
    if workspace:
        options = replace(options, workspace=int(parse_size(workspace)))
    opened, started = Bundle.open(bundle), time.perf_counter()
    engine, _ = find_engine(opened, target)
    made: list[dict[str, Any]] = []
    if engine is None or force:
        try:
            with progress_steps(f"building {target}") as tell:
                engine, made = build(opened, target, options, tell)
        except PermissionError as error:
            raise PPLLaVAError(f"can't write into {bundle}: {error.strerror}") from None
    seconds, size = time.perf_counter() - started, sum(f.bytes for f in engine.files.values())
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), "seconds": seconds, "bytes": size, "built": made, **engine.as_json()}))
        return
    title = f"{bundle}/engines/{target}, {human_bytes(size)}, {seconds:.1f} s"
    if made:
        rows = [
            (b["name"], human_bytes(b["bytes"]), "kept" if b["kept"] else f"{b['seconds']:.1f}", human_bytes(b["peak"]), human_bytes(b["predicted"]),
             human_bytes(b["largest"])) for b in made
        ]  # fmt: skip
        table(title, ("engine", "size", "seconds", "peak memory", "predicted", "largest weight"), rows, err=True)
        return
    stages = []
    for name, parts in engine.stages.items():
        stages.append((name, len(parts), human_bytes(sum(f.bytes for file, f in engine.files.items() if file.startswith(parts)))))
    table(title, ("stage", "pieces", "size"), stages, err=True)


def _capabilities(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if not all(re.fullmatch(r"\d{1,2}\.\d", part) for part in parts):
        raise PPLLaVAError(f"--capability {text!r}: compute capabilities look like 8.6,8.9")
    return parts


if __name__ == "__main__":
    main()
