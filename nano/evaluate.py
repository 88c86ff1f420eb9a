"""Measure how often nano answers right: draw clips, encode them as H.264, ask the real runtime, compare.

python -m ppllava_edge.nano.evaluate --questions 2000 --seed 12345 --precision int8
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.terminal import Command, human_bytes, table
from ppllava_edge.nano.calibration_clips import drawn
from ppllava_edge.nano.clips import spoken, write_clip
from ppllava_edge.nano.world import KINDS, ask, sample_scene
from ppllava_edge.runtime.video_qa import VideoQA


def evaluate(
    model: str | Path | None,
    questions: int,
    seed: int,
    uniform: bool = False,
    progress: Callable[[int], object] | None = None,
    opening: dict[str, Any] | None = None,
) -> list[dict[str, str]]:
    """Ask questions about freshly drawn clips, each kind at most once per clip.

    Args:
        model: A bundle; None: the packed one.
        questions: Number of questions.
        seed: Seed of the clips.
        uniform: Replace the question's pooling weights by equal ones, to see what guidance does.
        progress: Called with the number of answers so far.
        opening: Arguments of VideoQA.open.

    Returns:
        Dictionaries with kind, question, expected and answer.
    """
    qa = VideoQA(model, device="cpu")
    if uniform:
        _ignore_questions(qa)
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


def _ignore_questions(qa: VideoQA) -> None:
    """Give every patch the same pooling weight."""
    rows, columns = qa.pipeline.manifest.vision.grid

    def equal_weights(features: Any, q: Any) -> np.ndarray:
        return np.zeros((len(features), rows, columns), np.float32)

    qa.pipeline.window_weights = equal_weights  # type: ignore[method-assign]


def summary(answers: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """Count exact answers.

    Returns:
        Kind → {"right", "asked", "exact"}, exact being the share; "all" counts every kind.
    """
    found = {}
    for kind in [*KINDS, "all"]:
        mine = [a for a in answers if kind in (a["kind"], "all")]
        if mine:
            right = sum(a["answer"] == a["expected"] for a in mine)
            found[kind] = {"right": right, "asked": len(mine), "exact": right / len(mine)}
    return found


def bundle_at(precision: str, folder: Path) -> Path:
    """Build nano at another precision from its packed float16 weights.

    INT8 and INT4 are calibrated on drawn clips with a seed of their own.

    Args:
        precision: As ppllava-export --precision takes it.
        folder: Folder for the bundle.

    Returns:
        The bundle's directory; the packed one for "fp16".
    """
    if precision == "fp16":
        return packed_bundle()
    from ppllava_edge.export.convert import convert  # these load onnx
    from ppllava_edge.export.options import Options
    from ppllava_edge.export.quantisation.precision import parse_precision

    options = Options(str(packed_bundle()), folder / f"nano-{precision}", parse_precision(precision))
    if options.precision.quantized:
        from ppllava_edge.calibration.calibrate import Job, quantize_with_data

        quantize_with_data(options, Job(drawn=drawn))
    else:
        convert(options)
    return options.output


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--questions", type=click.IntRange(1, 10**7), default=2000, show_default=True, help="Number of questions."
)
@click.option(
    "--seed", type=int, default=12345, show_default=True, help="Seed of the clips; training used other seeds."
)
@click.option("--model", metavar="BUNDLE", help="A bundle instead of the packed one.")
@click.option(
    "--precision",
    help="fp32, fp16, int8, int4, or per part: make a bundle of this precision and measure it.",
)
@click.option(
    "--uniform", is_flag=True, help="Equal pooling weights instead of the question's: accuracy must collapse."
)
@click.option(
    "--select",
    type=click.Choice(["uniform", "guided"]),
    default="uniform",
    show_default=True,
    help="How frames are selected.",
)
@click.option(
    "--candidates",
    type=int,
    default=40,
    show_default=True,
    help="Frames that --select guided chooses from.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, including every answer.")
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
        raise PPLLaVAError("--model names a bundle with a precision of its own; leave out --precision")
    opening = {"select": select, "candidates": candidates}
    with tempfile.TemporaryDirectory() as folder:
        bundle = str(bundle_at(precision, Path(folder))) if precision else model
        started = time.perf_counter()
        answers = _with_progress(bundle, questions, seed, uniform, opening)
        seconds = time.perf_counter() - started
        _report(Bundle.open(bundle or packed_bundle()), answers, seed, uniform, seconds, as_json)


def _with_progress(
    model: str | None, questions: int, seed: int, uniform: bool, opening: dict[str, Any]
) -> list[dict[str, str]]:
    """Evaluate with a progress bar, if stderr is a terminal."""
    if not sys.stderr.isatty():
        return evaluate(model, questions, seed, uniform, opening=opening)
    with click.progressbar(length=questions, label="asking", file=sys.stderr) as bar:
        return evaluate(model, questions, seed, uniform, lambda done: bar.update(done - bar.pos), opening)


def _report(
    bundle: Bundle, answers: list[dict[str, str]], seed: int, uniform: bool, seconds: float, as_json: bool
) -> None:
    """Print the result as JSON or as a table."""
    found = summary(answers)
    if as_json:
        result = {
            "summary": found,
            "seed": seed,
            "uniform": uniform,
            "seconds": seconds,
            "bytes": bundle.total_bytes,
            "precision": bundle.manifest.precision,
            "parity": bundle.manifest.parity,
            "answers": answers,
        }
        click.echo(json.dumps(result))
        return
    weights = ", uniform pooling weights" if uniform else ""
    size = human_bytes(bundle.total_bytes)
    title = f"exact answers, seed {seed}{weights}; bundle of {size}; {seconds:.0f} s"
    rows = [(kind, f["asked"], f["right"], f"{100 * f['exact']:.1f} %") for kind, f in found.items()]
    table(title, ("kind", "asked", "right", "exact"), rows)


if __name__ == "__main__":
    main()
