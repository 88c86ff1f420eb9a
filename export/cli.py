"""ppllava-export: convert a checkpoint into a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ppllava_edge.engines.bundle.manifest import MANIFEST, POOLINGS, Manifest
from ppllava_edge.engines.bundle.manifest_parser import read_manifest
from ppllava_edge.engines.bundle.packed import PACKED
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.terminal import Command, fail, human_bytes, option, progress_steps, table, triple

if TYPE_CHECKING:
    from ppllava_edge.calibration.calibrate import Job
    from ppllava_edge.export.convert import StageReport
    from ppllava_edge.export.options import Options

OUTPUT = "Output"
PRECISION = "Precision and calibration"
CHECKPOINT = "Checkpoint"
POOLING = "Pooling"
PREDICTION = "Prediction"
TARGET_LIBRARIES = {"rtx": "tensorrt_rtx", "orin": "tensorrt", "orin-jp6": "tensorrt"}


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint")
@option("-o", "--output", group=OUTPUT, type=click.Path(path_type=Path), help="Directory of the bundle.")
@option("--force", group=OUTPUT, is_flag=True, help="Replace an existing bundle.")
@option(
    "--engine/--no-engine",
    group=OUTPUT,
    default=None,
    help="Whether to build the CPU engine too.  [default: if anything is quantised]",
)
@option(
    "--target",
    "targets",
    group=OUTPUT,
    multiple=True,
    help="Build this engine too, as ppllava-build does: cuda, rtx, orin, …  Repeat it for several engines.",
)
@option("--json", "as_json", group=OUTPUT, is_flag=True, help="Print the result as JSON.")
@option(
    "--precision",
    group=PRECISION,
    default="fp16",
    show_default=True,
    help="fp32, fp16, int8 or int4; or part by part, like vision=int8,decoder=int4,kv=int8.",
)
@option(
    "--block",
    group=PRECISION,
    type=click.Choice(["16", "32", "64", "128"]),
    default="32",
    show_default=True,
    help="Group size of INT4: weights per scale. 128 for TensorRT.",
)
@option(
    "--calibrate",
    group=PRECISION,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Calibrate on the videos of this folder. Use videos like those that the model will see.",
)
@option(
    "--questions",
    group=PRECISION,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Questions about the videos, one a line, each with a tab and its answer if you have one.",
)
@option(
    "--clips",
    group=PRECISION,
    type=click.IntRange(1, 1000),
    default=16,
    show_default=True,
    help="Use at most this many videos of --calibrate.",
)
@option(
    "--calibration-frames",
    group=PRECISION,
    type=click.IntRange(1, 1024),
    help="Frames per video.  [default: the model's]",
)
@option(
    "--keep-fp16",
    group=PRECISION,
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Layers that may keep a higher precision to pass the parity gate.",
)
@option(
    "--allow-drift",
    group=PRECISION,
    is_flag=True,
    help="Write the bundle even if it fails the parity gate; its manifest records that.",
)
@option(
    "--weight-only",
    group=PRECISION,
    is_flag=True,
    help="Quantise weights only, without calibration. The default without --calibrate, except for nano.",
)
@option(
    "--subfolder",
    group=CHECKPOINT,
    default="",
    help="Where the checkpoint is inside its directory or hub repository.",
)
@option(
    "--clip",
    group=CHECKPOINT,
    help="Directory or hub id of the question tower (CLIP or SigLIP), if the checkpoint lacks it.",
)
@option(
    "--base",
    group=CHECKPOINT,
    help="Directory or hub id of the language model's tokenizer, if the checkpoint lacks it.",
)
@option(
    "--no-tokenizer",
    group=CHECKPOINT,
    is_flag=True,
    help="Write a bundle without tokenizers, to be used with token ids only.",
)
@option("--template", group=CHECKPOINT, help="Prompt template: plain_v1, plain_qwen, conv_vcg_v1, …")
@option(
    "--pooling",
    group=POOLING,
    type=click.Choice(POOLINGS),
    help="Pooling method.  [default: the checkpoint's]",
)
@option(
    "--kernel",
    group=POOLING,
    callback=triple("--kernel"),
    metavar="T,H,W",
    help="Size of a pooling window for videos: frames, rows, columns.",
)
@option(
    "--stride",
    group=POOLING,
    callback=triple("--stride"),
    metavar="T,H,W",
    help="Step between windows for videos. Windows overlap if it is smaller than the kernel.",
)
@option(
    "--output-size",
    group=POOLING,
    callback=triple("--output-size"),
    metavar="T,H,W",
    help="Number of windows for videos.",
)
@option(
    "--image-kernel",
    group=POOLING,
    callback=triple("--image-kernel"),
    metavar="T,H,W",
    help="Size of a pooling window for images.",
)
@option(
    "--image-stride",
    group=POOLING,
    callback=triple("--image-stride"),
    metavar="T,H,W",
    help="Step between windows for images.",
)
@option(
    "--pooling-temperature",
    group=POOLING,
    type=float,
    help="Temperature of the softmax inside a window.  [default: the checkpoint's, else 0.01]",
)
@option(
    "--valuew-plus/--no-valuew-plus",
    group=POOLING,
    default=None,
    help="SigLIP: whether to multiply the weights by the attention of the vision head.",
)
@option(
    "--dry-run",
    group=PREDICTION,
    is_flag=True,
    help="Write nothing; predict file sizes and memory from the shapes.",
)
@option("--fit", group=PREDICTION, metavar="SIZE", help="With --dry-run: suggest how to fit a size like 8GB.")
@option(
    "--frames",
    group=PREDICTION,
    type=click.IntRange(1, 4096),
    help="With --dry-run: frames of a video.  [default: the model's]",
)
def main(checkpoint: str, output: Path | None, as_json: bool, **settings: Any) -> None:
    """Convert CHECKPOINT into a bundle for ppllava-run.

    CHECKPOINT is a directory in upstream's layout, a hub id (owner/name), a bundle in fp16 or fp32, or
    "nano". Weights are read one by one: the whole model is never in memory.
    """
    try:
        import ppllava_edge.export.convert  # noqa: F401  (loads onnx)
    except ModuleNotFoundError as error:
        fail(f"exporting needs the package {error.name}: pip install 'ppllava-edge[export]'")
    if output is None and not settings["dry_run"]:
        raise PPLLaVAError(
            "name the directory of the bundle to write with -o (or predict its size with --dry-run)"
        )
    options = _options(checkpoint, output or Path(), settings)
    _check_targets(settings["targets"])
    if settings["dry_run"]:
        _predict(options, settings["frames"], settings["fit"], as_json)
        return
    manifest, reports = _export(options, settings)
    engines = _build_engines(options.output, settings["targets"])
    if as_json:
        result = {
            "bundle": str(output),
            "name": manifest.name,
            "precision": manifest.precision,
            "parity": manifest.parity,
            "stages": [vars(report) for report in reports],
            "engines": engines,
        }
        click.echo(json.dumps(result))
    else:
        _print_result(options, manifest, reports)


def _options(checkpoint: str, output: Path, settings: dict[str, Any]) -> Options:
    from ppllava_edge.export.config.model import Overrides
    from ppllava_edge.export.options import Options
    from ppllava_edge.export.quantisation.precision import parse_precision

    overrides = Overrides(
        pooling=settings["pooling"],
        kernel=settings["kernel"],
        stride=settings["stride"],
        output_size=settings["output_size"],
        image_kernel=settings["image_kernel"],
        image_stride=settings["image_stride"],
        temperature=settings["pooling_temperature"],
        valuew_plus=settings["valuew_plus"],
        template=settings["template"],
    )
    return Options(
        checkpoint=checkpoint,
        output=output,
        precision=parse_precision(settings["precision"]),
        overrides=overrides,
        subfolder=settings["subfolder"],
        clip=settings["clip"],
        base=settings["base"],
        tokenizer=not settings["no_tokenizer"],
        force=settings["force"],
        block=int(settings["block"]),
        engine=settings["engine"],
    )


def _check_targets(targets: tuple[str, ...]) -> None:
    """Refuse engines that can't be built on this machine before the export, which may take hours."""
    from ppllava_edge.engines.libraries import installed_version
    from ppllava_edge.engines.targets.select import TARGETS

    for target in targets:
        if target not in TARGETS:
            raise PPLLaVAError(f"--target {target!r} is unknown; choose {', '.join(TARGETS)}")
        library = TARGET_LIBRARIES.get(target)
        if library and not installed_version(library):
            raise PPLLaVAError(
                f"--target {target} needs {library}, which is not installed; "
                "ppllava-doctor says what each target needs"
            )


def _predict(options: Options, frames: int | None, fit: str | None, as_json: bool) -> None:
    """Print the prediction of --dry-run."""
    from ppllava_edge.engines.machine.estimate import estimate, parse_size, suggest
    from ppllava_edge.export.predict import predict

    shape, int4 = predict(options, frames)
    estimated = estimate(shape)
    advice = suggest(shape, parse_size(fit), int4) if fit else []
    if as_json:
        video = {"frames": shape.frames, "visual_tokens": shape.visual_tokens}
        click.echo(json.dumps({**vars(estimated), **video, "advice": advice}))
        return
    title = f"{options.checkpoint}, {shape.frames} frames, {shape.visual_tokens} visual tokens: predicted"
    table(title, ("what", "size"), estimated.rows())
    for line in advice:
        click.echo(line)


def _export(options: Options, settings: dict[str, Any]) -> tuple[Manifest, list[StageReport]]:
    from ppllava_edge.export.convert import convert
    from ppllava_edge.export.progress import ProgressBar

    job = _calibration_job(options, settings)
    with ProgressBar() as progress:
        if job is None:
            return convert(options, progress)
        from ppllava_edge.calibration.calibrate import quantize_with_data

        manifest, reports, _ = quantize_with_data(options, job, progress)
        return manifest, reports


def _calibration_job(options: Options, settings: dict[str, Any]) -> Job | None:
    """The calibration that the options ask for; None: no quantisation, or weight-only (with a note)."""
    folder, questions = settings["calibrate"], settings["questions"]
    if not options.precision.quantized:
        if folder or questions:
            raise PPLLaVAError(
                "--calibrate and --questions are for quantisation; ask for it with --precision int8 or int4"
            )
        return None
    generates_clips = folder is None and not settings["weight_only"] and _is_nano(options)
    if settings["weight_only"] or (folder is None and not generates_clips):
        if questions:
            raise PPLLaVAError("--questions needs calibration videos; name their folder with --calibrate")
        if settings["weight_only"]:
            return None
        click.echo(
            "note: no calibration videos, so weights alone are quantised and nothing is compared with the "
            "float model; for INT8 activations, AWQ and the parity gate: --calibrate FOLDER",
            err=True,
        )
        return None
    try:
        from ppllava_edge.calibration.calibrate import Job
    except ModuleNotFoundError as error:
        fail(
            f"calibration runs the model, which needs the package {error.name}: "
            "pip install 'ppllava-edge[cpu,export]'"
        )
    return Job(
        folder=folder,
        questions=questions,
        frames=settings["calibration_frames"],
        clips=settings["clips"],
        keep_float=settings["keep_fp16"],
        allow_drift=settings["allow_drift"],
        drawn=_nano_clips() if generates_clips else None,
    )


def _is_nano(options: Options) -> bool:
    """Whether the source is a nano bundle, which is calibrated on generated clips."""
    from ppllava_edge.export.sources.source import source_bundle

    folder = source_bundle(options)
    if folder is None:
        return False
    manifest = read_manifest(folder / MANIFEST)
    return manifest.demo and manifest.name == PACKED


def _nano_clips() -> Callable[..., Any]:
    from ppllava_edge.nano.calibration_clips import drawn

    return drawn


def _build_engines(output: Path, targets: tuple[str, ...]) -> list[str]:
    """Build engines into a bundle that was just written."""
    from ppllava_edge.engines.bundle.bundle import Bundle
    from ppllava_edge.engines.targets.build import build

    for target in targets:
        with progress_steps(f"building {target}") as progress:
            build(Bundle.open(output), target, None, progress)
        click.echo(f"engine: {output}/engines/{target}", err=True)
    return list(targets)


def _print_result(options: Options, manifest: Manifest, reports: list[StageReport]) -> None:
    rows = [(r.stage, f"{r.parameters:,}", human_bytes(r.bytes), f"{r.seconds:.2f}") for r in reports]
    parameters = sum(report.parameters for report in reports)
    seconds = sum(report.seconds for report in reports)
    total = sum(file.bytes for file in manifest.files.values())
    rows.append(("all", f"{parameters:,}", human_bytes(total), f"{seconds:.2f}"))
    title = f"{manifest.name} → {options.output}"
    table(title, ("stage", "parameters", "size", "seconds"), rows, err=True)
    if manifest.parity:
        verdict = "holds" if manifest.parity["holds"] else f"does not hold: {manifest.parity['drift']}"
        click.echo(f"parity gate {verdict}; details: {options.output / 'report.html'}", err=True)


if __name__ == "__main__":
    main()
