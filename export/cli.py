"""ppllava-export: a checkpoint into a bundle."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import click

from ppllava_edge.engines.bundle.manifest import POOLINGS
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.terminal import Command, fail, human_bytes, table, triple


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory of the bundle to write.")
@click.option(
    "--precision",
    default="fp16",
    show_default=True,
    help="fp32, fp16, int8 or int4; or per part, like vision=int8,decoder=int4,kv=int8.",
)
@click.option(
    "--block",
    type=click.Choice(["16", "32", "64", "128"]),
    default="32",
    show_default=True,
    help="Weights per INT4 scale; 128 for TensorRT.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Videos to calibrate on: like those the model will see.",
)
@click.option(
    "--questions",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What to ask about them: one a line, optionally a tab and its answer.",
)
@click.option(
    "--clips",
    type=click.IntRange(1, 1000),
    default=16,
    show_default=True,
    help="The most videos of --calibrate to use.",
)
@click.option(
    "--calibration-frames", type=click.IntRange(1, 1024), help="Frames per video.  [the model's default]"
)
@click.option(
    "--keep-fp16",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Layers that may stay in higher precision for the parity gate.",
)
@click.option(
    "--allow-drift",
    is_flag=True,
    help="Keep a bundle that fails the parity gate (it says so in its manifest).",
)
@click.option("--weight-only", is_flag=True, help="nano: don't calibrate on drawn clips.")
@click.option(
    "--engine/--no-engine",
    default=None,
    help="Write engines/cpu into the bundle too.  [if anything is quantised]",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Build this engine too, as ppllava-build does: cuda, rtx, orin, …; may be given several times.",
)
@click.option(
    "--subfolder", default="", help="Where the checkpoint lies inside its directory or hub repository."
)
@click.option(
    "--clip", help="Directory or hub id of the question tower (CLIP or SigLIP), if the checkpoint lacks it."
)
@click.option(
    "--base", help="Directory or hub id of the language model's tokenizer, if the checkpoint lacks it."
)
@click.option(
    "--no-tokenizer", is_flag=True, help="Write a bundle without tokenizers, for use with token ids only."
)
@click.option("--pooling", type=click.Choice(POOLINGS), help="Pooling instead of the checkpoint's.")
@click.option("--kernel", callback=triple("--kernel"), metavar="T,H,W", help="Pooling window for videos.")
@click.option(
    "--stride",
    callback=triple("--stride"),
    metavar="T,H,W",
    help="Step between windows for videos; smaller than the kernel: they overlap.",
)
@click.option(
    "--output-size",
    callback=triple("--output-size"),
    metavar="T,H,W",
    help="Windows along frames, rows, columns.",
)
@click.option(
    "--image-kernel", callback=triple("--image-kernel"), metavar="T,H,W", help="Pooling window for images."
)
@click.option(
    "--image-stride",
    callback=triple("--image-stride"),
    metavar="T,H,W",
    help="Step between windows for images.",
)
@click.option(
    "--pooling-temperature",
    type=float,
    help="Temperature of the softmax inside a window.  [checkpoint's, 0.01]",
)
@click.option(
    "--valuew-plus/--no-valuew-plus",
    default=None,
    help="SigLIP: multiply the weights by the head's attention.",
)
@click.option("--template", help="Prompt template by name (plain_v1, plain_qwen, conv_vcg_v1, …).")
@click.option("--dry-run", is_flag=True, help="Write nothing; predict sizes and memory, from shapes alone.")
@click.option(
    "--fit", metavar="SIZE", help="With --dry-run: what to change so that an answer fits, like 8GB."
)
@click.option(
    "--frames",
    type=click.IntRange(1, 4096),
    help="With --dry-run: frames of the answer.  [the model's default]",
)
@click.option("--force", is_flag=True, help="Replace a bundle that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print the closing table as JSON.")
def main(checkpoint: str, output: Path | None, precision: str, as_json: bool, **options: Any) -> None:
    """Turn CHECKPOINT (a directory in upstream's layout, or a hub id) into a bundle that ppllava-run opens.

    Weights are read tensor by tensor: the whole model is never in memory.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to end: tidy up as for an interrupt
    try:
        from ppllava_edge.export.config import Overrides
        from ppllava_edge.export.convert import convert
        from ppllava_edge.export.quantisation.precision import parse_precision
        from ppllava_edge.export.sources import Options
    except ModuleNotFoundError as error:
        fail(f"exporting needs the package {error.name}: pip install 'ppllava-edge[export]'")
    overrides = Overrides(
        options["pooling"],
        options["kernel"],
        options["stride"],
        options["output_size"],
        options["image_kernel"],
        options["image_stride"],
        options["pooling_temperature"],
        options["valuew_plus"],
        options["template"],
    )
    if output is None and not options["dry_run"]:
        raise PPLLaVAError(
            "name the directory of the bundle to write with -o (or predict its size with --dry-run)"
        )
    job = Options(
        checkpoint,
        output or Path(),
        parse_precision(precision),
        overrides,
        options["subfolder"],
        options["clip"],
        options["base"],
        not options["no_tokenizer"],
        options["force"],
        int(options["block"]),
        options["engine"],
    )
    _check_targets(options["targets"])
    if options["dry_run"]:
        _predict(job, options["frames"], options["fit"], as_json)
        return
    calibration = _calibration(job, options)
    with _progress() as progress:
        if calibration is None:
            manifest, reports = convert(job, progress)
        else:
            from ppllava_edge.calibration.calibrate import quantize_with_data

            manifest, reports, _ = quantize_with_data(job, calibration, progress)
    engines = _build(job.output, options["targets"])
    rows = [(r.stage, f"{r.parameters:,}", human_bytes(r.bytes), f"{r.seconds:.2f}") for r in reports]
    if as_json:
        stages = [vars(r) for r in reports]
        click.echo(
            json.dumps(
                {
                    "bundle": str(output),
                    "name": manifest.name,
                    "precision": manifest.precision,
                    "parity": manifest.parity,
                    "stages": stages,
                    "engines": engines,
                }
            )
        )
        return
    total = sum(f.bytes for f in manifest.files.values())
    rows.append(
        (
            "all",
            f"{sum(r.parameters for r in reports):,}",
            human_bytes(total),
            f"{sum(r.seconds for r in reports):.2f}",
        )
    )
    table(f"{manifest.name} → {output}", ("stage", "parameters", "size", "seconds"), rows, err=True)
    if manifest.parity:
        verdict = "holds" if manifest.parity["holds"] else f"does not hold: {manifest.parity['drift']}"
        click.echo(f"parity gate {verdict}; the whole story: {job.output / 'report.html'}", err=True)


def _check_targets(targets: tuple[str, ...]) -> None:
    """Refuse what can't be built here before hours go into the export."""
    from ppllava_edge.engines.libraries import installed_version
    from ppllava_edge.engines.targets.select import TARGETS

    for target in targets:
        if target not in TARGETS:
            raise PPLLaVAError(f"--target {target!r} is unknown; choose {', '.join(TARGETS)}")
        library = {"rtx": "tensorrt_rtx", "orin": "tensorrt", "orin-jp6": "tensorrt"}.get(target)
        if library and not installed_version(library):
            raise PPLLaVAError(
                f"--target {target} needs {library}, which is not installed; ppllava-doctor says what each target needs"
            )


def _build(output: Path, targets: tuple[str, ...]) -> list[str]:
    """Engines into a bundle that was just written."""
    from ppllava_edge.engines.bundle.bundle import Bundle
    from ppllava_edge.engines.targets.build import build
    from ppllava_edge.engines.terminal import progress_steps

    for target in targets:
        with progress_steps(f"building {target}") as tell:
            build(Bundle.open(output), target, None, tell)
        click.echo(f"engine: {output}/engines/{target}", err=True)
    return list(targets)


def _predict(job: Any, frames: int | None, fit: str | None, as_json: bool) -> None:
    """What --dry-run prints."""
    from ppllava_edge.engines.machine.estimate import estimate, parse_size, suggest
    from ppllava_edge.export.convert import predict

    shape, int4 = predict(job, frames)
    found = estimate(shape)
    advice = suggest(shape, parse_size(fit), int4) if fit else []
    if as_json:
        click.echo(
            json.dumps(
                {
                    **vars(found),
                    "frames": shape.frames,
                    "visual_tokens": shape.visual_tokens,
                    "advice": advice,
                }
            )
        )
        return
    table(
        f"{job.checkpoint}, {shape.frames} frames, {shape.visual_tokens} visual tokens: predicted",
        ("what", "size"),
        found.rows(),
    )
    for line in advice:
        click.echo(line)


def _calibration(job: Any, options: dict[str, Any]) -> Any:
    """The calibration job that the options ask for, or None for weight-only quantisation, said on stderr."""
    if not job.precision.quantized:
        if options["calibrate"] or options["questions"]:
            raise PPLLaVAError(
                "--calibrate and --questions are for integers; ask for some with --precision int8 or int4"
            )
        return None
    folder, is_nano = options["calibrate"], _is_nano(Path(job.checkpoint))
    if options["weight_only"] or (folder is None and not is_nano):
        if options["questions"]:
            raise PPLLaVAError(
                "--questions are asked about calibration videos; name their folder with --calibrate"
            )
        click.echo(
            "note: no calibration videos, so weights alone are quantised and nothing is compared with the float model; "
            "for INT8 activations, AWQ and the parity gate: --calibrate FOLDER",
            err=True,
        )
        return None
    try:
        from ppllava_edge.calibration.calibrate import Job
    except ModuleNotFoundError as error:
        fail(
            f"calibration runs the model, which needs the package {error.name}: pip install 'ppllava-edge[cpu,export]'"
        )
    return Job(
        folder,
        options["questions"],
        options["calibration_frames"],
        options["clips"],
        options["keep_fp16"],
        options["allow_drift"],
    )


def _is_nano(folder: Path) -> bool:
    from ppllava_edge.engines.bundle.manifest import MANIFEST
    from ppllava_edge.engines.bundle.manifest_parser import read_manifest

    return (
        (folder / MANIFEST).is_file()
        and (manifest := read_manifest(folder / MANIFEST)).demo
        and manifest.name == "nano"
    )


def _progress() -> Any:
    """A progress bar on stderr over the bytes written; quiet when stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from ppllava_edge.export.convert import Progress

    class Shown(Progress):
        def __init__(self) -> None:
            columns = (
                TextColumn("{task.description:12s}"),
                BarColumn(),
                DownloadColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Bar(
                *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
            )
            self.task = self.bar.add_task("reading", total=None)
            self.steps: dict[str, Any] = {}

        def __enter__(self) -> Shown:
            self.bar.start()
            return self

        def __exit__(self, *_: object) -> None:
            self.bar.stop()

        def start(self, total_bytes: int) -> None:
            self.bar.update(self.task, total=total_bytes)

        def stage(self, name: str) -> None:
            self.bar.update(self.task, description=name)

        def wrote(self, count: int) -> None:
            self.bar.advance(self.task, count)

        def step(self, what: str, done: int, of: int) -> None:
            if what not in self.steps:
                self.steps[what] = self.bar.add_task(what, total=of)
            self.bar.update(self.steps[what], completed=done, total=of)

    return Shown()


if __name__ == "__main__":
    main()
