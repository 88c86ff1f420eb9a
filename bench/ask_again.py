"""What a question costs: a video's first, the next, and the first after a restart with features on disk.

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

ONCE = ("video_decode", "vision")
EACH = ("question", "select", "pooling")  # what is visual about a further question
ROWS = ("open", *ONCE, *EACH, "prefill", "first_token")


def measure(
    bundle: str | None, video: str, frames: int | None, question: str, rounds: int, device: str, engine: str
) -> dict[str, Any]:
    """Seconds by stage: the first ask, the median of the next ones, and an ask from disk; and next to first, visual work only."""
    from ppllava_edge.runtime.video_qa import VideoQA

    with tempfile.TemporaryDirectory() as folder:
        qa = VideoQA(bundle, device, engine=engine, cache=folder)
        qa.pipeline.load()
        qa.pipeline.encode_question(
            qa.text.question_ids(question)[0]
        )  # engines set themselves up in their first run
        first = _ask(qa, video, frames, question)
        opened = qa.open(video, frames)
        again = [opened.ask(question, max_new_tokens=2).timings for _ in range(rounds)]
        following = {row: float(np.median([timings.get(row, 0.0) for timings in again])) for row in ROWS}
        restarted = _ask(
            VideoQA(bundle, device, engine=engine, cache=folder), video, frames, question, load=True
        )
        stored = sum(path.stat().st_size for path in Path(folder).glob("*.features"))
    visual = [sum(timings[stage] for stage in (*ONCE, *EACH)) for timings in (first, following)]
    return {
        "model": qa.name,
        "engine": qa.pipeline.engine_name,
        "first": first,
        "next": following,
        "restarted": restarted,
        "visual_ratio": visual[1] / visual[0],
        "cached_bytes": stored,
    }


def _ask(qa: Any, video: str, frames: int | None, question: str, load: bool = False) -> dict[str, float]:
    if load:
        qa.pipeline.load()
    began = time.perf_counter()
    opened = qa.open(video, frames)
    opening = time.perf_counter() - began
    return {"open": opening, **opened.ask(question, max_new_tokens=2).timings}


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", required=False)
@click.option("--video", type=click.Path(exists=True), help="A video file.  [default: nano's sample]")
@click.option("--frames", type=int)
@click.option("--question", default="What color is the circle?", show_default=True)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Of next asks; the median counts.",
)
@click.option("--device", default="auto", show_default=True)
@click.option("--engine", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True)
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
    """Seconds by stage for the first ask, the next, and the first after a restart."""
    video = video or str(sample_path())
    found = measure(bundle, video, frames, question, rounds, device, engine)
    if as_json:
        print(json.dumps(found))
        return
    columns = [found[name] for name in ("first", "next", "restarted")]
    rows = [
        (
            row,
            *(
                "-" if row == "open" and column is found["next"] else f"{1000 * column.get(row, 0.0):.2f}"
                for column in columns
            ),
        )
        for row in ROWS
    ]
    table(
        f"{found['model']} ({found['engine']}), ms; open: until the video can be asked",
        ("stage", "first ask", "next ask", "restarted, from disk"),
        rows,
    )
    print(
        f"visual work of a next ask: {100 * found['visual_ratio']:.2f} % of a first one; on disk: {found['cached_bytes'] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
