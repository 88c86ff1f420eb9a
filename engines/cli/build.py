"""ppllava-build: an engine for one kind of machine, from a bundle's standard graphs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import Engine, find_engine
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.machine.estimate import parse_size
from ppllava_edge.engines.targets.build import build
from ppllava_edge.engines.targets.select import TARGETS
from ppllava_edge.engines.terminal import Command, fail, human_bytes, option, progress_steps, table

if TYPE_CHECKING:  # needs onnx, which may be missing
    from ppllava_edge.engines.targets.tensorrt.plan import Options


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle")
@option(
    "--target",
    group="Engine",
    type=click.Choice(TARGETS),
    default="cpu",
    show_default=True,
    help="Kind of machine.",
)
@option("--force", group="Engine", is_flag=True, help="Build again even if the engine is up to date.")
@option(
    "--capability",
    group="TensorRT",
    metavar="8.6,8.9,…",
    help="Compute capabilities to build rtx for.  [default: 8.6,8.9,12.0]",
)
@option(
    "--capacity",
    group="TensorRT",
    type=click.IntRange(16),
    help="Positions of the KV cache.  [default: enough for a typical prompt and answer]",
)
@option(
    "--frames",
    group="TensorRT",
    type=click.IntRange(1),
    help="Typical length of a clip, in frames.  [default: the model's]",
)
@option(
    "--plugin",
    group="TensorRT",
    type=click.Choice(("auto", "none", "python", "aot")),
    default="auto",
    show_default=True,
    help="How the engine calls the pooling kernel.",
)
@option(
    "--profiles",
    group="TensorRT",
    type=click.IntRange(1, 2),
    default=2,
    show_default=True,
    help="Profiles of the decoder: one each for prefill and decode, or one for both.",
)
@option(
    "--piece",
    group="TensorRT",
    metavar="SIZE",
    help="Maximum size of a decoder's weights in one engine file.  [default: 512MB]",
)
@option("--workspace", group="TensorRT", metavar="SIZE", help="Maximum scratch memory of an engine.")
@option(
    "--level",
    group="TensorRT",
    type=click.IntRange(0, 5),
    default=3,
    show_default=True,
    help="TensorRT's optimisation level.",
)
@option("--json", "as_json", group="Output", is_flag=True, help="Print what was built as JSON.")
def main(bundle: str, target: str, force: bool, as_json: bool, **tensorrt_options: Any) -> None:
    """Write an engine for TARGET into BUNDLE, a directory or nano.

    The runtime opens an engine on machines that it fits, and the standard graphs everywhere else.

    \b
    cpu, cuda   ONNX Runtime, with the operators that it runs fastest
    lowered     ONNX Runtime before 1.24 (Python 3.10): basic opset-20 operators
    rtx         TensorRT-RTX, ahead of time, on any machine: no GPU is needed
    orin        TensorRT 10.15 or later (JetPack 7), on the machine itself; any GPU with full TensorRT
    orin-jp6    TensorRT 10.3 (JetPack 6), on the machine itself
    """
    try:
        import onnx  # noqa: F401
    except ImportError:
        fail("building needs the package onnx: pip install 'ppllava-edge[export]'")
    options = _tensorrt_options(**tensorrt_options)
    opened = Bundle.open(bundle)
    started = time.perf_counter()
    engine, _ = find_engine(opened, target)
    reports: list[dict[str, Any]] = []
    if engine is None or force:
        try:
            with progress_steps(f"building {target}") as progress:
                engine, reports = build(opened, target, options, progress)
        except PermissionError as error:
            raise PPLLaVAError(f"can't write into {opened.path}: {error.strerror}") from None
    seconds = time.perf_counter() - started
    if as_json:
        size = sum(file.bytes for file in engine.files.values())
        summary = {"seconds": seconds, "bytes": size, "built": reports}
        click.echo(json.dumps({**summary, **engine.as_json()}))
    else:
        _print_table(engine, reports, seconds)


def _tensorrt_options(
    capability: str | None,
    capacity: int | None,
    frames: int | None,
    plugin: str,
    profiles: int,
    piece: str | None,
    workspace: str | None,
    level: int,
) -> Options:
    from ppllava_edge.engines.targets.tensorrt.plan import Options

    given: dict[str, Any] = {}  # options whose defaults are in Options
    if capability:
        given["capabilities"] = _capabilities(capability)
    if piece:
        given["piece_bytes"] = int(parse_size(piece))
    if workspace:
        given["workspace"] = int(parse_size(workspace))
    return Options(
        capacity=capacity, frames=frames, plugin=plugin, decoder_profiles=profiles, level=level, **given
    )


def _capabilities(text: str) -> tuple[str, ...]:
    capabilities = tuple(part.strip() for part in text.split(","))
    if not all(re.fullmatch(r"\d{1,2}\.\d", capability) for capability in capabilities):
        raise PPLLaVAError(f"--capability {text!r}: compute capabilities look like 8.6,8.9")
    return capabilities


def _print_table(engine: Engine, reports: Sequence[dict[str, Any]], seconds: float) -> None:
    """Print a row per file of a TensorRT build, or a row per stage."""
    size = human_bytes(sum(file.bytes for file in engine.files.values()))
    title = f"{engine.folder}, {size}, {seconds:.1f} s"
    if reports:
        columns = ("engine", "size", "seconds", "peak memory", "predicted", "largest weight")
        table(title, columns, [_report_row(report) for report in reports], err=True)
        return
    rows = []
    for stage, names in engine.stages.items():
        stage_bytes = sum(file.bytes for name, file in engine.files.items() if name.startswith(names))
        rows.append((stage, len(names), human_bytes(stage_bytes)))
    table(title, ("stage", "pieces", "size"), rows, err=True)


def _report_row(report: dict[str, Any]) -> tuple[str, ...]:
    return (
        report["name"],
        human_bytes(report["bytes"]),
        "kept" if report["kept"] else f"{report['seconds']:.1f}",
        human_bytes(report["peak"]),
        human_bytes(report["predicted"]),
        human_bytes(report["largest"]),
    )


if __name__ == "__main__":
    main()
