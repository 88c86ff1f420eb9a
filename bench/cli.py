"""ppllava-bench: how long every stage of a bundle takes on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.bench.measuring.plots import import_pyplot, save_figure
from ppllava_edge.bench.measuring.stages import measure
from ppllava_edge.engines.bundle.packed import find_bundle
from ppllava_edge.engines.terminal import Command, human_bytes, table


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", required=False)
@click.option(
    "--runs",
    type=click.IntRange(1, 10000),
    default=20,
    show_default=True,
    help="Measured runs of every stage.",
)
@click.option(
    "--warmup",
    type=click.IntRange(0, 1000),
    default=3,
    show_default=True,
    help="Runs before the measured ones.",
)
@click.option("--frames", type=click.IntRange(1, 4096), help="Frames of the clip.  [default: the model's]")
@click.option(
    "--text-tokens",
    type=click.IntRange(1, 100000),
    default=32,
    show_default=True,
    help="Tokens of the prompt beside the visual ones.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(2, 100000),
    default=32,
    show_default=True,
    help="Tokens generated in every run.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to run.",
)
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="auto, onnxruntime, tensorrt, rtx, standard, or a target of ppllava-build.",
)
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads of the engine.  [default: one per core]"
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--plot", metavar="PNG", help="Draw the times of the stages.")
def main(bundle: str | None, as_json: bool, plot: str | None, **options: Any) -> None:
    """Measure BUNDLE (default: the packed demonstration model, nano).

    Prints seconds per stage, tokens per second, peak memory and the time of a cold start.
    """
    report = measure(str(find_bundle(bundle)), **options)
    if plot:
        draw_plot(report, Path(plot))
    if as_json:
        click.echo(json.dumps(report))
    else:
        show(report)


def show(report: dict[str, Any]) -> None:
    """Print a report of `measure` as two tables."""
    columns = ("p50", "p95", "p99", "least")
    rows = [
        (name, *(f"{1000 * seconds[column]:.2f}" for column in columns))
        for name, seconds in report["stages"].items()
    ]
    title = f"{report['model']}: {report['frames']} frames, {report['visual_tokens']} visual tokens, ms"
    table(title, ("stage", *columns), rows)
    facts = [
        ("tokens/s", f"{report['tokens_per_second']:.1f}"),
        ("decoder weights read", f"{report['decode_gb_per_second']:.1f} GB/s"),
        ("copy bandwidth here", f"{report['copy_gb_per_second']:.1f} GB/s"),
        ("cold start", f"{report['cold_start_seconds']:.2f} s from process start to all stages open"),
        ("peak memory", human_bytes(report["peak_memory_bytes"])),
        ("engine", report["engine"]),
        ("machine", report["machine"]),
    ]
    table("", ("what", "value"), facts)


def draw_plot(report: dict[str, Any], path: Path) -> None:
    """Draw bars of p50 with whiskers to p99, one per stage.

    Args:
        report: The report of `measure`.
        path: Where the PNG goes.

    Raises:
        PPLLaVAError: If matplotlib is missing or the file can't be written.
    """
    plt = import_pyplot()
    stages = report["stages"]
    p50 = np.array([1000 * seconds["p50"] for seconds in stages.values()])
    p99 = np.array([1000 * seconds["p99"] for seconds in stages.values()])
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(stages) + 1.4), layout="constrained")
    whiskers = [np.zeros_like(p50), p99 - p50]
    axes.barh(list(stages), p50, xerr=whiskers, color="#4477aa", ecolor="#222222", capsize=3)
    for y, value in enumerate(p50):
        axes.annotate(f" {value:.2f}", (value, y), va="bottom", fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds, p50 (whisker: p99)")
    clip = f"{report['frames']} frames, {report['visual_tokens']} visual tokens"
    axes.set_title(f"{report['model']}: {clip}, {report['device']}", fontsize=10)
    save_figure(figure, path, dpi=130)


if __name__ == "__main__":
    main()
