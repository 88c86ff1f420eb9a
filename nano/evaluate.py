"""How often nano is right: draw clips, encode them to H.264, ask the real runtime, compare.

python -m ppllava_edge.nano.evaluate --questions 2000 --seed 12345 --precision int8
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.terminal import Command, human_bytes, table
from ppllava_edge.nano.clips import spoken, write_clip
from ppllava_edge.nano.world import KINDS, ask, sample_scene


def evaluate(
    model: str | Path | None,
    questions: int,
    seed: int,
    uniform: bool = False,
    progress: Any = None,
    opening: dict[str, Any] | None = None,
) -> list[dict[str, str]]:
    """Ask `questions` questions about freshly drawn clips, every kind that a clip allows once. Returns kind, question, expected, answer.

    model: a bundle; None: the packed one. uniform: replace the question's pooling weights by equal ones, to see what guidance does.
    opening: arguments of VideoQA.open.
    """
    from ppllava_edge.runtime.video_qa import VideoQA

    qa = VideoQA(model, device="cpu")
    if uniform:
        rows, columns = qa.pipeline.manifest.vision.grid
        qa.pipeline.window_weights = lambda features, q: np.zeros((len(features), rows, columns), np.float32)  # type: ignore[method-assign]
    rng = np.random.default_rng([seed, 77])
    answers: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(answers) < questions:
            scene = sample_scene(rng)
            video = qa.open(write_clip(Path(folder) / "clip.mp4", scene, rng), **(opening or {}))
            for kind in KINDS:
                asked = ask(scene, kind, rng)
                if asked is None or len(answers) >= questions:
                    continue
                question = spoken(asked[0])
                answer = video.ask(question, max_new_tokens=48).text
                answers.append({"kind": kind, "question": question, "expected": asked[1], "answer": answer})
            if progress:
                progress(len(answers))
    return answers


def summary(answers: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """kind → {"right", "asked", "exact"}; "all" over everything."""
    found = {}
    for kind in [*KINDS, "all"]:
        mine = [a for a in answers if kind in (a["kind"], "all")]
        if mine:
            right = sum(a["answer"] == a["expected"] for a in mine)
            found[kind] = {"right": right, "asked": len(mine), "exact": right / len(mine)}
    return found


def bundle_at(precision: str, folder: Path) -> Path:
    """Nano at another precision, made in folder from its packed float16 weights; INT8 and INT4 are calibrated on drawn clips of their own seed."""
    from ppllava_edge.export.convert import convert
    from ppllava_edge.export.quantisation.precision import parse_precision
    from ppllava_edge.export.sources import Options

    if precision == "fp16":
        return packed_bundle()
    options = Options(str(packed_bundle()), folder / f"nano-{precision}", parse_precision(precision))
    if options.precision.quantized:
        from ppllava_edge.calibration.calibrate import Job, quantize_with_data

        quantize_with_data(options, Job())
    else:
        convert(options)
    return options.output


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--questions", type=click.IntRange(1, 10**7), default=2000, show_default=True)
@click.option(
    "--seed", type=int, default=12345, show_default=True, help="Of the clips; training used others."
)
@click.option("--model", metavar="BUNDLE", help="A bundle instead of the packed one.")
@click.option(
    "--precision",
    help="fp32, fp16, int8, int4, or per part: the packed weights at that precision, made for this.",
)
@click.option(
    "--uniform", is_flag=True, help="Equal pooling weights instead of the question's: accuracy must collapse."
)
@click.option(
    "--select",
    type=click.Choice(["uniform", "guided"]),
    default="uniform",
    show_default=True,
    help="Which frames are looked at.",
)
@click.option("--candidates", type=int, default=40, show_default=True, help="With --select guided.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, every answer included.")
def main(
    questions: int,
    seed: int,
    model: str | None,
    precision: str | None,
    uniform: bool,
    select: str,
    candidates: int,
    as_json: bool,
) -> None:
    """Measure exact answers on held-out clips, through encoded files and the real runtime."""
    if model and precision:
        raise PPLLaVAError("--model names a bundle that has its precision; leave out --precision")
    with tempfile.TemporaryDirectory() as folder:
        bundle = str(bundle_at(precision, Path(folder))) if precision else model
        _measure(questions, seed, bundle, uniform, as_json, {"select": select, "candidates": candidates})


def _measure(
    questions: int, seed: int, model: str | None, uniform: bool, as_json: bool, opening: dict[str, Any]
) -> None:
    started = time.perf_counter()
    if sys.stderr.isatty():
        with click.progressbar(length=questions, label="asking", file=sys.stderr) as bar:
            answers = evaluate(
                model, questions, seed, uniform, lambda done: bar.update(done - bar.pos), opening
            )
    else:
        answers = evaluate(model, questions, seed, uniform, opening=opening)
    seconds, found = time.perf_counter() - started, summary(answers)
    bundle = Bundle.open(model or packed_bundle())
    if as_json:
        click.echo(
            json.dumps(
                {
                    "summary": found,
                    "seed": seed,
                    "uniform": uniform,
                    "seconds": seconds,
                    "bytes": bundle.total_bytes,
                    "precision": bundle.manifest.precision,
                    "parity": bundle.manifest.parity,
                    "answers": answers,
                }
            )
        )
        return
    title = f"exact answers, seed {seed}{', uniform pooling weights' if uniform else ''}; bundle of {human_bytes(bundle.total_bytes)}; {seconds:.0f} s"
    table(
        title,
        ("kind", "asked", "right", "exact"),
        [(kind, f["asked"], f["right"], f"{100 * f['exact']:.1f} %") for kind, f in found.items()],
    )


if __name__ == "__main__":
    main()
