"""Looking ahead: how many guessed tokens are right, and what that is worth on this CPU.

    python -m ppllava_edge.bench.look_ahead [--model BUNDLE] [--questions 300] [--kind describe]

Answers questions about drawn clips (nano's world) with and without drafts, in turns, and compares every token. Then: what a pass over 1 to 8
positions costs, which says when drafts pay.
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
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.targets.build import build_cpu
from ppllava_edge.engines.terminal import Command, table
from ppllava_edge.nano.clips import spoken, write_clip
from ppllava_edge.nano.world import KINDS, ask, sample_scene

COUNTS = ("asked", "equal", "tokens", "passes", "proposed", "accepted", "plain", "ahead")


def compare(bundle: str, questions: int, seed: int, kinds: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """kind → asked, equal (answers), tokens, passes, proposed, accepted, seconds with and without."""
    from ppllava_edge.runtime.video_qa import VideoQA

    qa, rng, found, asked_all = (
        VideoQA(bundle, device="cpu", engine="cpu"),
        np.random.default_rng([seed, 78]),
        dict[str, dict[str, float]](),
        0,
    )
    with tempfile.TemporaryDirectory() as folder:
        while asked_all < questions:
            scene = sample_scene(rng)
            video = qa.open(write_clip(Path(folder) / "clip.mp4", scene, rng))
            for kind in kinds:
                asked = ask(scene, kind, rng)
                if asked is None:
                    continue
                question, asked_all = spoken(asked[0]), asked_all + 1
                first, second = (
                    video.ask(question, 48, look_ahead=ahead)
                    for ahead in ((False, True) if asked_all % 2 else (True, False))
                )
                plain, ahead = (first, second) if asked_all % 2 else (second, first)
                for name in (kind, "all"):
                    row = found.setdefault(name, dict.fromkeys(COUNTS, 0.0))
                    assert ahead.lookup is not None
                    seconds = {"plain": plain.timings["generate"], "ahead": ahead.timings["generate"]}
                    counted = {
                        "asked": 1,
                        "equal": plain.text == ahead.text,
                        "tokens": ahead.new_tokens - 1,
                        **seconds,
                        **ahead.lookup,
                    }
                    for key, value in counted.items():
                        row[key] += value
    return found


def cost_of_passes(bundle: str, rounds: int = 30) -> dict[int, float]:
    """Positions in a pass → seconds, with 256 positions in the cache before it; medians, in turns."""
    from ppllava_edge.runtime import Pipeline

    p = Pipeline.open(bundle, engine="cpu")
    rng, times = np.random.default_rng(0), dict[int, list[float]]()
    before = min(256, p.manifest.decoder.context // 2)
    rows = rng.standard_normal((before + 8, p.manifest.decoder.hidden_size)).astype(np.float32) * 0.02
    sequence = p.decoder.start(before + 8, 64)
    sequence.run(rows[:before])
    for turn in range(rounds + 2):
        for count in range(1, 9):
            started = time.perf_counter()
            sequence.run(rows[before : before + count])
            seconds = time.perf_counter() - started
            sequence.forget(count)
            if turn >= 2:
                times.setdefault(count, []).append(seconds)
    return {count: float(np.median(values)) for count, values in times.items()}


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", metavar="BUNDLE", help="A bundle of nano's instead of the packed one.")
@click.option(
    "--passes-of", metavar="BUNDLE", help="Measure the cost of passes over this bundle instead (any model)."
)
@click.option("--questions", type=click.IntRange(1, 10**6), default=300, show_default=True)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Only questions of this kind.")
@click.option("--seed", type=int, default=12345, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    model: str | None, passes_of: str | None, questions: int, kinds: tuple[str, ...], seed: int, as_json: bool
) -> None:
    """Compare answers with and without looking ahead, and measure what passes over several positions cost."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(model) if model else Path(shutil.copytree(packed_bundle(), Path(scratch) / "nano"))
        for path in {bundle, Path(passes_of or bundle)}:
            if find_engine(Bundle.open(path), "cpu")[0] is None:
                build_cpu(Bundle.open(path))
        found: dict[str, Any] = {
            "answers": compare(str(bundle), questions, seed, tuple(kinds or KINDS)),
            "passes": cost_of_passes(passes_of or str(bundle)),
        }
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = []
    for kind, r in found["answers"].items():
        per_pass = r["tokens"] / r["passes"] if r["passes"] else 0.0
        right = f"{100 * r['accepted'] / r['proposed']:.0f} %" if r["proposed"] else ""
        rows.append(
            (
                kind,
                int(r["asked"]),
                int(r["equal"]),
                int(r["proposed"]),
                right,
                f"{per_pass:.2f}",
                f"{r['plain'] / max(r['ahead'], 1e-9):.2f}",
            )
        )
    table(
        "with and without looking ahead",
        ("kind", "asked", "same answer", "guessed", "right", "tokens a pass", "faster by"),
        rows,
    )
    one = found["passes"][1]
    table(
        "a pass over several positions",
        ("positions", "ms", "of one"),
        [(n, f"{1000 * s:.2f}", f"{s / one:.2f}") for n, s in found["passes"].items()],
    )


if __name__ == "__main__":
    main()
