"""ppllava-build: engines for one kind of machine, from a bundle's standard graphs."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from .bundle import Bundle, FileEntry, hash_file
from .engine import ENGINE, Engine, engine_folder, find_engine, fingerprint, minor
from .errors import PPLLaVAError
from .ort import import_onnxruntime
from .terminal import Command, fail, human_bytes, table

TARGETS = ("cpu",)
PIECE_BYTES = 1 << 30  # of a decoder's weights: pieces are opened side by side
Tell = Callable[[str, int, int], None]  # stage, done, of how many


def build_cpu(bundle: Bundle, tell: Tell = lambda stage, done, of: None) -> Engine:
    """Write engines/cpu into a bundle: its graphs rewritten for ONNX Runtime's CPU provider. Weights are copied one by one.

    Written beside its place and renamed, so an engine is whole or not there.
    """
    from .cpu import for_cpu
    from .graph import TYPE_NAME, Graph
    from .pieces import split

    place = engine_folder(bundle.path, "cpu")
    place.parent.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".cpu.", suffix=".part", dir=place.parent))
    try:
        stages: dict[str, tuple[str, ...]] = {}
        kv_dtype = bundle.manifest.decoder.kv_dtype
        names = [name.removesuffix(".onnx") for name in bundle.manifest.required_files() if name.endswith(".onnx")]
        for done, name in enumerate(names):
            tell(name, done, len(names))
            g = for_cpu(Graph.read(bundle.file(f"{name}.onnx")))
            kv_dtype = next((TYPE_NAME[v.type.tensor_type.elem_type] for v in g.inputs if v.name.startswith("past.")), kv_dtype)
            if name != "decoder" or g.weight_bytes <= PIECE_BYTES:
                g.save(work / f"{name}.onnx", check=False)  # vendor operators are not known to the checker
                stages[name] = (f"{name}.onnx",)
                continue
            pieces = split(g, budget=PIECE_BYTES)
            for i, piece in enumerate(pieces):
                piece.graph.save(work / f"{name}-{i}.onnx", check=False)
            stages[name] = tuple(f"{name}-{i}.onnx" for i in range(len(pieces)))
        files = {path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in sorted(work.iterdir())}
        made_by = {"onnxruntime": minor(str(import_onnxruntime().__version__))}
        engine = Engine(place, "cpu", fingerprint(bundle.manifest), made_by, kv_dtype, stages, files)
        (work / ENGINE).write_text(json.dumps(engine.as_json(), indent=1) + "\n", encoding="utf-8")
        work.chmod(0o755)
        shutil.rmtree(place, ignore_errors=True)
        work.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    tell("all", len(names), len(names))
    return engine


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(TARGETS), default="cpu", show_default=True, help="Kind of machine.")
@click.option("--force", is_flag=True, help="Build it again even if it is there and fresh.")
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON.")
def main(bundle: Path, target: str, force: bool, as_json: bool) -> None:
    """Write an engine for TARGET into BUNDLE. The runtime opens it where it fits, and the standard graphs everywhere else."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        fail("building needs the package onnx: pip install 'ppllava-edge[export]'")
    opened, started = Bundle.open(bundle), time.perf_counter()
    engine, _ = find_engine(opened, target)
    if engine is None or force:
        try:
            engine = build_cpu(opened)
        except PermissionError as error:
            raise PPLLaVAError(f"can't write into {bundle}: {error.strerror}") from None
    seconds, size = time.perf_counter() - started, sum(f.bytes for f in engine.files.values())
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), "seconds": seconds, "bytes": size, **engine.as_json()}))
        return
    rows = []
    for name, parts in engine.stages.items():
        rows.append((name, len(parts), human_bytes(sum(f.bytes for file, f in engine.files.items() if file.startswith(parts)))))
    table(f"{bundle}/engines/{target}, {human_bytes(size)}, {seconds:.1f} s", ("stage", "pieces", "size"), rows, err=True)


if __name__ == "__main__":
    main()
