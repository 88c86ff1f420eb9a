"""ppllava-build: engines for one kind of machine, from a bundle's standard graphs."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import (
    find_engine,
)
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.machine.estimate import parse_size
from ppllava_edge.engines.targets.build import build
from ppllava_edge.engines.targets.select import TARGETS
from ppllava_edge.engines.terminal import Command, fail, human_bytes, option, progress_steps, table


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@option(
    "--target",
    group="Engine",
    type=click.Choice(TARGETS),
    default="cpu",
    show_default=True,
    help="Kind of machine.",
)
@option("--force", group="Engine", is_flag=True, help="Build it again even if it is there and fresh.")
@option(
    "--capability",
    group="TensorRT",
    metavar="8.6,8.9,…",
    help="Compute capabilities that rtx builds for.  [default: 8.6,8.9,12.0]",
)
@option(
    "--capacity",
    group="TensorRT",
    type=click.IntRange(16),
    help="Positions of the KV cache in a TensorRT engine.  [default: the usual prompt and answer]",
)
@option(
    "--frames",
    group="TensorRT",
    type=click.IntRange(1),
    help="Usual length of a clip.  [default: the model's]",
)
@option(
    "--plugin",
    group="TensorRT",
    type=click.Choice(("auto", "none", "python", "aot")),
    default="auto",
    show_default=True,
    help="The pooling kernel in TensorRT.",
)
@option(
    "--profiles",
    group="TensorRT",
    type=click.IntRange(1, 2),
    default=2,
    show_default=True,
    help="Of a TensorRT decoder: prefill and one token, or one for both.",
)
@option(
    "--piece",
    group="TensorRT",
    metavar="SIZE",
    help="Most weights of a decoder in one TensorRT engine.  [default: 512MB]",
)
@option("--workspace", group="TensorRT", metavar="SIZE", help="Most scratch memory of a TensorRT engine.")
@option(
    "--level",
    group="TensorRT",
    type=click.IntRange(0, 5),
    default=3,
    show_default=True,
    help="TensorRT's optimisation level.",
)
@option("--json", "as_json", group="Output", is_flag=True, help="Print what was built as JSON.")
def main(
    bundle: Path,
    target: str,
    force: bool,
    capability: str | None,
    capacity: int | None,
    frames: int | None,
    plugin: str,
    profiles: int,
    piece: str | None,
    workspace: str | None,
    level: int,
    as_json: bool,
) -> None:
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
    from ppllava_edge.engines.targets.tensorrt_plan import Options

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
        click.echo(
            json.dumps(
                {"bundle": str(bundle), "seconds": seconds, "bytes": size, "built": made, **engine.as_json()}
            )
        )
        return
    title = f"{bundle}/engines/{target}, {human_bytes(size)}, {seconds:.1f} s"
    if made:
        rows = [
            (
                b["name"],
                human_bytes(b["bytes"]),
                "kept" if b["kept"] else f"{b['seconds']:.1f}",
                human_bytes(b["peak"]),
                human_bytes(b["predicted"]),
                human_bytes(b["largest"]),
            )
            for b in made
        ]
        table(
            title, ("engine", "size", "seconds", "peak memory", "predicted", "largest weight"), rows, err=True
        )
        return
    stages = []
    for name, parts in engine.stages.items():
        stages.append(
            (
                name,
                len(parts),
                human_bytes(sum(f.bytes for file, f in engine.files.items() if file.startswith(parts))),
            )
        )
    table(title, ("stage", "pieces", "size"), stages, err=True)


def _capabilities(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if not all(re.fullmatch(r"\d{1,2}\.\d", part) for part in parts):
        raise PPLLaVAError(f"--capability {text!r}: compute capabilities look like 8.6,8.9")
    return parts


if __name__ == "__main__":
    main()
