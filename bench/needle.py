"""Needles in long videos: an object that is there for about 1 % of the time; guided selection against uniform sampling, on nano.

    python -m ppllava_edge.bench.needle --clips 100

Clips are drawn, encoded to H.264 and answered by the real runtime. One to three objects rest all the time; another one is shown for a moment.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.engines.terminal import Command, table
from ppllava_edge.nano.clips import FILE_SIDE, spoken
from ppllava_edge.nano.world import COLOR_NAMES, SHAPE_NAMES, STILL, Scene, draw, sample_scene
from ppllava_edge.runtime.media.writing import write_video

FPS = 2
KINDS = ("color", "shape", "presence", "absence")


def needle_scene(rng: np.random.Generator, seconds: float, length: float) -> tuple[Scene, int]:
    """A scene of resting objects (times in seconds), and which of them is the needle."""
    scene = sample_scene(rng)
    while len(scene) < 2:
        scene = sample_scene(rng)
    n = len(scene)
    needle, begin = int(rng.integers(n)), float(rng.uniform(0, seconds - length))
    appears, vanishes = np.zeros(n, np.float32), np.full(n, 1e9, np.float32)
    appears[needle], vanishes[needle] = begin, begin + length
    motions = np.full(n, STILL)
    return replace(
        scene,
        motions=motions,
        velocity=np.zeros((n, 2), np.float32),
        appears=appears,
        vanishes=vanishes,
        staggered=False,
    ), needle


def write_needle(path: Path, scene: Scene, needle: int, rng: np.random.Generator, seconds: float) -> None:
    """Encode it. Two pictures are drawn, with and without the needle; every frame has noise of its own."""
    begin, end = float(scene.appears[needle]), float(scene.vanishes[needle])
    other_time = max(begin - 1, 0) if begin > 0 else end + 1
    without, with_needle = (
        draw(scene, np.array([t]), rng, FILE_SIDE, noise=0)[0][0].astype(np.int16)
        for t in (other_time, begin)
    )
    noise = rng.normal(0, 2, (16, FILE_SIDE, FILE_SIDE, 1)).round().astype(np.int16)

    def frames() -> Iterator[np.ndarray]:
        for i in range(round(seconds * FPS)):
            picture = with_needle if begin <= i / FPS < end else without
            yield np.clip(picture + noise[rng.integers(16)], 0, 255).astype(np.uint8)

    write_video(path, frames(), FPS)


def questions(scene: Scene, needle: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(kind, question, answer) about the needle; absence: about an object that never appears, but shares its colour or its shape."""
    color, shape = COLOR_NAMES[scene.colors[needle]], SHAPE_NAMES[scene.shapes[needle]]
    other_colors = [c for i, c in enumerate(COLOR_NAMES) if i not in scene.colors]
    other_shapes = [s for i, s in enumerate(SHAPE_NAMES) if i not in scene.shapes]
    never = (
        (str(rng.choice(other_colors)), shape)
        if rng.random() < 0.5 or not other_shapes
        else (color, str(rng.choice(other_shapes)))
    )
    return [
        ("color", f"what color is the {shape} ?", color),
        ("shape", f"what shape is the {color} object ?", shape),
        ("presence", f"is there a {color} {shape} ?", "yes"),
        ("absence", f"is there a {never[0]} {never[1]} ?", "no"),
    ]


def evaluate(
    clips: int, seconds: float, share: float, candidates: int, seed: int, model: str | None
) -> dict[str, Any]:
    """Ask both ways about every clip. Returns right answers by way and kind, and seconds by way."""
    from ppllava_edge.runtime.video_qa import VideoQA

    qa, rng = VideoQA(model, device="cpu"), np.random.default_rng([seed, 91])
    ways: dict[str, dict[str, Any]] = {
        "uniform": {},
        "guided": {"select": "guided", "candidates": candidates},
    }
    found: dict[str, Any] = {
        way: {"right": dict.fromkeys(KINDS, 0), "seen": 0, "seconds": 0.0} for way in ways
    }
    with tempfile.TemporaryDirectory() as folder:
        for n in range(clips):
            scene, needle = needle_scene(rng, seconds, share * seconds)
            path = Path(folder) / "clip.mp4"
            write_needle(path, scene, needle, rng, seconds)
            asked = questions(scene, needle, rng)
            for way, opening in ways.items():
                began = time.perf_counter()
                video = qa.open(path, **opening)
                for kind, question, expected in asked:
                    answer = video.ask(spoken(question), max_new_tokens=16)
                    found[way]["right"][kind] += answer.text == expected
                    found[way]["seen"] += kind == "color" and any(
                        scene.appears[needle] <= t < scene.vanishes[needle] for t in answer.frame_times
                    )
                found[way]["seconds"] += time.perf_counter() - began
            if sys.stderr.isatty():
                print(f"\r{n + 1} of {clips}", end="", file=sys.stderr)
    return found


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--clips", type=click.IntRange(1, 10000), default=100, show_default=True)
@click.option("--seconds", type=float, default=600.0, show_default=True, help="Length of a clip.")
@click.option(
    "--share", type=float, default=0.01, show_default=True, help="Of the time that the needle is there."
)
@click.option("--candidates", type=int, default=256, show_default=True)
@click.option("--seed", type=int, default=12345, show_default=True)
@click.option("--model", metavar="BUNDLE")
@click.option("--json", "as_json", is_flag=True)
def main(
    clips: int, seconds: float, share: float, candidates: int, seed: int, model: str | None, as_json: bool
) -> None:
    """Right answers in %, guided against uniform."""
    found = evaluate(clips, seconds, share, candidates, seed, model)
    if as_json:
        print(
            json.dumps(
                {
                    "clips": clips,
                    "seconds": seconds,
                    "share": share,
                    "candidates": candidates,
                    "seed": seed,
                    **found,
                }
            )
        )
        return
    about = KINDS[:3]
    rows = [
        (
            way,
            *(f"{100 * f['right'][kind] / clips:.0f}" for kind in KINDS),
            f"{100 * sum(f['right'][k] for k in about) / clips / len(about):.1f}",
            f"{100 * f['seen'] / clips:.0f}",
            f"{f['seconds'] / clips:.2f}",
        )
        for way, f in found.items()
    ]
    table(
        f"{clips} clips of {seconds:g} s, needle for {100 * share:g} %; right, %",
        ("way", *KINDS, "about the needle", "needle seen", "s a clip"),
        rows,
    )


if __name__ == "__main__":
    main()
