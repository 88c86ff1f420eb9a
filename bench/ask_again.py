"""Time a video's first question, the next ones, and the first one after a restart with cached features.

python -m ppllava_edge.bench.ask_again [BUNDLE] [--video FILE]
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
from ppllava_edge.nano import sample_path
from ppllava_edge.runtime.video_qa import VideoQA

ONCE = ("video_decode", "vision")  # visual work of the first question only
EACH = ("question", "select", "pooling")  # visual work of every question
ROWS = ("open", *ONCE, *EACH, "prefill", "first_token")


def measure(
    bundle: str | None, video: str, frames: int | None, question: str, rounds: int, device: str, engine: str
) -> dict[str, Any]:
    """Time questions about a video: the first, the next ones, and the first after a restart.

    Args:
        bundle: As VideoQA takes it.
        video: A video file.
        frames: Frames that the model sees; None: the model's default.
        question: The question.
        rounds: Number of next questions, whose median is reported.
        device, engine: As VideoQA takes them.

    Returns:
        "first", "next", "restarted": stage → seconds. "visual_ratio": visual work of a next question over
        that of the first. "cached_bytes": size of the features on disk. "model", "engine": names of the model
        and the engine.
    """
    with tempfile.TemporaryDirectory() as cache:
        qa = VideoQA(bundle, device, engine=engine, cache=cache)
        qa.pipeline.load()
        # Engines initialise in their first run, which must not be measured.
        qa.pipeline.encode_question(qa.text.question_ids(question)[0])
        first = _open_and_ask(qa, video, frames, question)
        opened = qa.open(video, frames)
        again = [opened.ask(question, max_new_tokens=2).timings for _ in range(rounds)]
        following = {row: float(np.median([timings.get(row, 0.0) for timings in again])) for row in ROWS}
        restarted_qa = VideoQA(bundle, device, engine=engine, cache=cache)
        restarted_qa.pipeline.load()
        restarted = _open_and_ask(restarted_qa, video, frames, question)
        cached_bytes = sum(path.stat().st_size for path in Path(cache).glob("*.features"))
    visual_first, visual_next = (
        sum(timings[stage] for stage in (*ONCE, *EACH)) for timings in (first, following)
    )
    return {
        "model": qa.name,
        "engine": qa.pipeline.engine_name,
        "first": first,
        "next": following,
        "restarted": restarted,
        "visual_ratio": visual_next / visual_first,
        "cached_bytes": cached_bytes,
    }


def _open_and_ask(qa: VideoQA, video: str, frames: int | None, question: str) -> dict[str, float]:
    """Seconds by stage; "open": until the video can be asked."""
    started = time.perf_counter()
    opened = qa.open(video, frames)
    opening = time.perf_counter() - started
    return {"open": opening, **opened.ask(question, max_new_tokens=2).timings}


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", required=False)
@click.option("--video", type=click.Path(exists=True), help="A video file.  [default: nano's sample]")
@click.option("--frames", type=int, help="Frames that the model sees.  [default: the model's]")
@click.option("--question", default="What color is the circle?", show_default=True, help="What to ask.")
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Number of next questions; their median is reported.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--engine", default="auto", show_default=True, help="As for ppllava-run.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(
    bundle: str | None,
    video: str | None,
    frames: int | None,
    question: str,
    rounds: int,
    device: str,
    engine: str,
    as_json: bool,
) -> None:
    """Time the first question about a video, the next, and the first after a restart, stage by stage."""
    report = measure(bundle, video or str(sample_path()), frames, question, rounds, device, engine)
    if as_json:
        print(json.dumps(report))
        return
    rows = []
    for row in ROWS:
        cells = {name: f"{1000 * report[name].get(row, 0.0):.2f}" for name in ("first", "next", "restarted")}
        if row == "open":
            cells["next"] = "-"
        rows.append((row, *cells.values()))
    title = f"{report['model']} ({report['engine']}), ms; open: until the video can be asked"
    table(title, ("stage", "first ask", "next ask", "restarted, from disk"), rows)
    share, size = 100 * report["visual_ratio"], report["cached_bytes"] / 1e6
    print(f"visual work of a next ask: {share:.2f} % of a first one; on disk: {size:.1f} MB")


if __name__ == "__main__":
    main()
