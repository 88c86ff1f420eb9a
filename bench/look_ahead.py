"""Prompt lookup: the share of drafted tokens that are right, and the speed-up on this CPU.

    python -m ppllava_edge.bench.look_ahead [--model BUNDLE] [--questions 300] [--kind describe]

Answers questions about drawn clips (nano's world) with and without drafts, in turns, and compares answers.
Then it measures passes over 1 to 8 positions, which shows when drafts pay off.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import find_engine
from ppllava_edge.engines.bundle.packed import find_bundle, packed_bundle
from ppllava_edge.engines.targets.build import build_cpu
from ppllava_edge.engines.terminal import Command, table
from ppllava_edge.nano.clips import spoken, write_clip
from ppllava_edge.nano.world import KINDS, ask, sample_scene
from ppllava_edge.runtime.pipeline.factory import Pipeline
from ppllava_edge.runtime.session.answer import Answer
from ppllava_edge.runtime.video_qa import VideoQA

COUNTS = ("asked", "equal", "tokens", "passes", "proposed", "accepted", "plain", "ahead")
WARMUP = 2  # rounds that aren't measured


def compare(bundle: str, questions: int, seed: int, kinds: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Answer questions with and without looking ahead.

    Args:
        bundle: A bundle of nano's with an engine for the CPU.
        questions: Minimum number of questions.
        seed: Seed of scenes and questions.
        kinds: Kinds of questions.

    Returns:
        Kind, and "all" → "asked", "equal" (answers), "tokens", "passes", "proposed", "accepted", and seconds
        of generation without ("plain") and with drafts ("ahead").
    """
    qa = VideoQA(bundle, device="cpu", engine="cpu")
    rng = np.random.default_rng([seed, 78])
    report = dict[str, dict[str, float]]()
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        while count < questions:
            scene = sample_scene(rng)
            video = qa.open(write_clip(Path(folder) / "clip.mp4", scene, rng))
            for kind in kinds:
                pair = ask(scene, kind, rng)
                if pair is None:
                    continue
                count += 1
                answers = dict[bool, Answer]()
                for look_ahead in (False, True) if count % 2 else (True, False):
                    answers[look_ahead] = video.ask(spoken(pair[0]), 48, look_ahead=look_ahead)
                for name in (kind, "all"):
                    row = report.setdefault(name, dict.fromkeys(COUNTS, 0.0))
                    _count(row, plain=answers[False], ahead=answers[True])
    return report


def _count(row: dict[str, float], plain: Answer, ahead: Answer) -> None:
    """Add the two answers to one question to a row of the report."""
    assert ahead.lookup is not None
    row["asked"] += 1
    row["equal"] += plain.text == ahead.text
    row["tokens"] += ahead.new_tokens - 1
    row["plain"] += plain.timings["generate"]
    row["ahead"] += ahead.timings["generate"]
    for name, value in ahead.lookup.items():
        row[name] += value


def cost_of_passes(bundle: str, rounds: int = 30) -> dict[int, float]:
    """Time decoder passes over 1 to 8 positions, in turns, after 256 cached ones.

    Args:
        bundle: Any bundle with an engine for the CPU.
        rounds: Measured passes of every length.

    Returns:
        Positions in a pass → median seconds.
    """
    pipeline = Pipeline.open(bundle, engine="cpu")
    decoder = pipeline.manifest.decoder
    cached = min(256, decoder.context // 2)
    embeddings = np.random.default_rng(0).standard_normal((cached, decoder.hidden_size)).astype(np.float32)
    tokens = [i % decoder.vocab for i in range(3, 11)]
    times = dict[int, list[float]]()
    sequence = pipeline.decoder.start(cached + 8, 64)
    sequence.feed(0.02 * embeddings)
    for round_number in range(rounds + WARMUP):
        for count in range(1, 9):
            started = time.perf_counter()
            sequence.verify(tokens[:count])
            sequence.logits()
            seconds = time.perf_counter() - started
            sequence.forget(count)
            if round_number >= WARMUP:
                times.setdefault(count, []).append(seconds)
    pipeline.decoder.finish(sequence)
    return {count: float(np.median(values)) for count, values in times.items()}


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", metavar="BUNDLE", help="A bundle of nano's instead of the packed one.")
@click.option("--passes-of", metavar="BUNDLE", help="Time the passes of this bundle instead (any model).")
@click.option(
    "--questions", type=click.IntRange(1, 10**6), default=300, show_default=True, help="Questions to ask."
)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Only questions of this kind.")
@click.option("--seed", type=int, default=12345, show_default=True, help="Seed of clips and questions.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(
    model: str | None, passes_of: str | None, questions: int, kinds: tuple[str, ...], seed: int, as_json: bool
) -> None:
    """Compare answers with and without looking ahead, and time passes over several positions."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = find_bundle(model)
        if bundle == packed_bundle():  # an installed package may be read-only: build the engine in a copy
            bundle = Path(shutil.copytree(bundle, Path(scratch) / "nano"))
        other = find_bundle(passes_of) if passes_of else bundle
        for path in {bundle, other}:
            if find_engine(Bundle.open(path), "cpu")[0] is None:
                build_cpu(Bundle.open(path))
        report: dict[str, Any] = {
            "answers": compare(str(bundle), questions, seed, tuple(kinds or KINDS)),
            "passes": cost_of_passes(str(other)),
        }
    if as_json:
        click.echo(json.dumps(report))
    else:
        show(report)


def show(report: dict[str, Any]) -> None:
    """Print the report as two tables."""
    rows = []
    for kind, row in report["answers"].items():
        per_pass = row["tokens"] / row["passes"] if row["passes"] else 0.0
        right = f"{100 * row['accepted'] / row['proposed']:.0f} %" if row["proposed"] else ""
        speedup = row["plain"] / max(row["ahead"], 1e-9)
        counts = (int(row[name]) for name in ("asked", "equal", "proposed"))
        rows.append((kind, *counts, right, f"{per_pass:.2f}", f"{speedup:.2f}"))
    columns = ("kind", "asked", "same answer", "drafted", "accepted", "tokens a pass", "speedup")
    table("with and without looking ahead", columns, rows)
    one = report["passes"][1]
    passes = [(n, f"{1000 * s:.2f}", f"{s / one:.2f}") for n, s in report["passes"].items()]
    table("a pass over several positions", ("positions", "ms", "relative to 1"), passes)


if __name__ == "__main__":
    main()
