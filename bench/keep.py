"""What it costs to keep the first question's visual tokens: next questions about nano's clips, answered three ways.

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

WAYS = ("features", "prefix", "tokens")
PER_CLIP = 6  # the first opens the chat and isn't counted


def evaluate(questions: int, seed: int, model: str | None) -> dict[str, dict[str, float]]:
    """Ask about fresh clips; the first question of each is about something else. Returns right answers, asked, and seconds to the first token, by way."""
    from ppllava_edge.runtime.video_qa import VideoQA

    qa, rng = VideoQA(model, device="cpu"), np.random.default_rng([seed, 55])
    found = {way: {"right": 0.0, "asked": 0.0, "first_token": 0.0} for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        while found[WAYS[0]]["asked"] < questions:
            scene = sample_scene(rng)
            path = write_clip(Path(folder) / "clip.mp4", scene, rng)
            asked = [a for kind in rng.permutation(KINDS) if (a := ask(scene, str(kind), rng))][:PER_CLIP]
            for way in WAYS:
                video = qa.open(path, keep=way)
                for n, (question, expected) in enumerate(asked):
                    answer = video.ask(spoken(question), max_new_tokens=40)
                    if n:
                        found[way]["right"] += answer.text == expected
                        found[way]["asked"] += 1
                        found[way]["first_token"] += answer.timings["first_token"]
    return found


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--questions", type=click.IntRange(1, 10**6), default=1000, show_default=True)
@click.option("--seed", type=int, default=12345, show_default=True)
@click.option("--model", metavar="BUNDLE")
@click.option("--json", "as_json", is_flag=True)
def main(questions: int, seed: int, model: str | None, as_json: bool) -> None:
    """Exact answers to next questions, by what is kept."""
    began = time.perf_counter()
    found: Any = evaluate(questions, seed, model)
    if as_json:
        print(json.dumps(found))
        return
    rows = [
        (
            way,
            int(f["asked"]),
            f"{100 * f['right'] / f['asked']:.1f}",
            f"{1000 * f['first_token'] / f['asked']:.2f}",
        )
        for way, f in found.items()
    ]
    table(
        f"next questions, seed {seed}; {time.perf_counter() - began:.0f} s",
        ("keep", "asked", "exact, %", "to the first token, ms"),
        rows,
    )


if __name__ == "__main__":
    main()
