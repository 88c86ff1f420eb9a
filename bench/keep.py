"""Accuracy and speed of the three `keep` options, on further questions about nano's clips.

python -m ppllava_edge.bench.keep --questions 1000
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.engines.terminal import Command, table
from ppllava_edge.nano.clips import spoken, write_clip
from ppllava_edge.nano.world import KINDS, ask, sample_scene
from ppllava_edge.runtime.video_qa import VideoQA

WAYS = ("features", "prefix", "tokens")
PER_CLIP = 6  # questions; the first one opens the chat and isn't counted


def evaluate(questions: int, seed: int, model: str | None) -> dict[str, dict[str, float]]:
    """Ask about fresh clips with every `keep` option; the first question about a clip isn't counted.

    Args:
        questions: Minimum number of counted questions.
        seed: Seed of scenes and questions.
        model: As VideoQA takes it.

    Returns:
        Option → "right" (exact answers), "asked", "first_token" (seconds to the first token, summed).
    """
    qa = VideoQA(model, device="cpu")
    rng = np.random.default_rng([seed, 55])
    report = {way: {"right": 0.0, "asked": 0.0, "first_token": 0.0} for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        while report[WAYS[0]]["asked"] < questions:
            scene = sample_scene(rng)
            path = write_clip(Path(folder) / "clip.mp4", scene, rng)
            pairs = [pair for kind in rng.permutation(KINDS) if (pair := ask(scene, str(kind), rng))]
            for way in WAYS:
                _ask_all(qa, path, way, pairs[:PER_CLIP], report[way])
    return report


def _ask_all(qa: VideoQA, path: Path, way: str, pairs: list[tuple[str, str]], row: dict[str, float]) -> None:
    """Ask (question, expected answer) pairs about one clip and count in a row of the report."""
    video = qa.open(path, keep=way)
    for number, (question, expected) in enumerate(pairs):
        answer = video.ask(spoken(question), max_new_tokens=40)
        if number:
            row["right"] += answer.text == expected
            row["asked"] += 1
            row["first_token"] += answer.timings["first_token"]


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--questions",
    type=click.IntRange(1, 10**6),
    default=1000,
    show_default=True,
    help="Counted questions per option.",
)
@click.option("--seed", type=int, default=12345, show_default=True, help="Seed of clips and questions.")
@click.option("--model", metavar="BUNDLE", help="A bundle of nano's instead of the packed one.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(questions: int, seed: int, model: str | None, as_json: bool) -> None:
    """Count exact answers to further questions, for each `keep` option."""
    started = time.perf_counter()
    report: Any = evaluate(questions, seed, model)
    if as_json:
        print(json.dumps(report))
        return
    rows = []
    for way, row in report.items():
        exact = f"{100 * row['right'] / row['asked']:.1f}"
        milliseconds = f"{1000 * row['first_token'] / row['asked']:.2f}"
        rows.append((way, int(row["asked"]), exact, milliseconds))
    title = f"next questions, seed {seed}; {time.perf_counter() - started:.0f} s"
    table(title, ("keep", "asked", "exact, %", "to the first token, ms"), rows)


if __name__ == "__main__":
    main()
