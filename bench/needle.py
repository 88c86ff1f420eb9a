"""Needles in long videos: guided frame selection against uniform sampling, on nano.

    python -m ppllava_edge.bench.needle --clips 100

One to three objects are visible all the time; another one, the needle, for about 1 % of it. Clips
are drawn, encoded to H.264 and answered by the real runtime.
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
from ppllava_edge.runtime.video_qa import VideoQA

FPS = 2
KINDS = ("color", "shape", "presence", "absence")
ABOUT_NEEDLE = KINDS[:3]


def needle_scene(rng: np.random.Generator, seconds: float, length: float) -> tuple[Scene, int]:
    """Sample a scene of resting objects.

    Args:
        rng: Source of randomness.
        seconds: Length of the clip.
        length: Seconds for which the needle is shown.

    Returns:
        The scene (times in seconds), and the index of the needle among its objects.
    """
    scene = sample_scene(rng)
    while len(scene) < 2:
        scene = sample_scene(rng)
    n = len(scene)
    needle = int(rng.integers(n))
    begin = float(rng.uniform(0, seconds - length))
    appears, vanishes = np.zeros(n, np.float32), np.full(n, 1e9, np.float32)
    appears[needle], vanishes[needle] = begin, begin + length
    resting = replace(
        scene,
        motions=np.full(n, STILL),
        velocity=np.zeros((n, 2), np.float32),
        appears=appears,
        vanishes=vanishes,
        staggered=False,
    )
    return resting, needle


def write_needle(path: Path, scene: Scene, needle: int, rng: np.random.Generator, seconds: float) -> None:
    """Encode a scene to H.264.

    Only two pictures are drawn, with and without the needle; every frame gets its own noise.

    Args:
        path: The video file to write.
        scene, needle: Results of needle_scene.
        rng: Source of the noise.
        seconds: Length of the clip.
    """
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
    """(kind, question, answer) about the needle.

    "absence" asks about an object that never appears, but has the needle's colour or its shape.
    """
    color, shape = COLOR_NAMES[scene.colors[needle]], SHAPE_NAMES[scene.shapes[needle]]
    other_colors = [name for i, name in enumerate(COLOR_NAMES) if i not in scene.colors]
    other_shapes = [name for i, name in enumerate(SHAPE_NAMES) if i not in scene.shapes]
    if rng.random() < 0.5 or not other_shapes:
        absent = f"{rng.choice(other_colors)} {shape}"
    else:
        absent = f"{color} {rng.choice(other_shapes)}"
    return [
        ("color", f"what color is the {shape} ?", color),
        ("shape", f"what shape is the {color} object ?", shape),
        ("presence", f"is there a {color} {shape} ?", "yes"),
        ("absence", f"is there a {absent} ?", "no"),
    ]


def evaluate(
    clips: int, seconds: float, share: float, candidates: int, seed: int, model: str | None
) -> dict[str, Any]:
    """Ask about every clip, with uniform and with guided selection.

    Args:
        clips: Clips to draw.
        seconds: Length of a clip.
        share: Share of the time for which the needle is shown, 0 to 1.
        candidates: Frames that guided selection chooses among.
        seed: Seed of clips and questions.
        model: As VideoQA takes it.

    Returns:
        "uniform" and "guided" → "right" (exact answers by kind), "seen" (clips where a selected frame shows
        the needle), "seconds".
    """
    qa = VideoQA(model, device="cpu")
    rng = np.random.default_rng([seed, 91])
    ways: dict[str, dict[str, Any]] = {
        "uniform": {},
        "guided": {"select": "guided", "candidates": candidates},
    }
    report: dict[str, Any] = {
        way: {"right": dict.fromkeys(KINDS, 0), "seen": 0, "seconds": 0.0} for way in ways
    }
    with tempfile.TemporaryDirectory() as folder:
        for n in range(clips):
            scene, needle = needle_scene(rng, seconds, share * seconds)
            path = Path(folder) / "clip.mp4"
            write_needle(path, scene, needle, rng, seconds)
            asked = questions(scene, needle, rng)
            shown = float(scene.appears[needle]), float(scene.vanishes[needle])
            for way, options in ways.items():
                _ask_all(qa, path, options, asked, shown, report[way])
            if sys.stderr.isatty():
                print(f"\r{n + 1} of {clips}", end="", file=sys.stderr)
    return report


def _ask_all(
    qa: VideoQA,
    path: Path,
    options: dict[str, Any],
    asked: list[tuple[str, str, str]],
    shown: tuple[float, float],
    row: dict[str, Any],
) -> None:
    """Ask all questions about one clip and count in `row`. shown: when the needle appears and vanishes."""
    started = time.perf_counter()
    video = qa.open(path, **options)
    for kind, question, expected in asked:
        answer = video.ask(spoken(question), max_new_tokens=16)
        row["right"][kind] += answer.text == expected
        if kind == "color":
            row["seen"] += any(shown[0] <= t < shown[1] for t in answer.frame_times)
    row["seconds"] += time.perf_counter() - started


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--clips", type=click.IntRange(1, 10000), default=100, show_default=True, help="Clips to draw.")
@click.option("--seconds", type=float, default=600.0, show_default=True, help="Length of a clip.")
@click.option(
    "--share",
    type=float,
    default=0.01,
    show_default=True,
    help="Share of the time for which the needle is shown.",
)
@click.option(
    "--candidates",
    type=int,
    default=256,
    show_default=True,
    help="Frames that guided selection chooses among.",
)
@click.option("--seed", type=int, default=12345, show_default=True, help="Seed of clips and questions.")
@click.option("--model", metavar="BUNDLE", help="A bundle of nano's instead of the packed one.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(as_json: bool, **options: Any) -> None:
    """Compare guided frame selection with uniform sampling: exact answers, in %."""
    report = evaluate(**options)
    if as_json:
        given = {name: options[name] for name in ("clips", "seconds", "share", "candidates", "seed")}
        print(json.dumps({**given, **report}))
        return
    clips = options["clips"]
    rows = []
    for way, row in report.items():
        right = [f"{100 * row['right'][kind] / clips:.0f}" for kind in KINDS]
        about = sum(row["right"][kind] for kind in ABOUT_NEEDLE) / len(ABOUT_NEEDLE)
        seen = f"{100 * row['seen'] / clips:.0f}"
        rows.append((way, *right, f"{100 * about / clips:.1f}", seen, f"{row['seconds'] / clips:.2f}"))
    title = f"{clips} clips of {options['seconds']:g} s, needle for {100 * options['share']:g} %; right, %"
    table(title, ("way", *KINDS, "about the needle", "needle seen", "s a clip"), rows)


if __name__ == "__main__":
    main()
