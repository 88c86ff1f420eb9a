"""A live view for a long time: frames pushed faster than they can be encoded, with memory and lag sampled.

python -m ppllava_edge.bench.live_soak --frames 100000 --fps 20 --pace 500 --plot soak.png
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.bench.measuring.plots import import_pyplot, save_figure
from ppllava_edge.engines.machine.memory import resident_memory
from ppllava_edge.engines.terminal import Command, table
from ppllava_edge.nano.clips import clip_frames, sample_scene_for_the_readme
from ppllava_edge.runtime.live.view import Live
from ppllava_edge.runtime.video_qa import VideoQA

SAMPLES = 400


def soak(
    frames: int, fps: float, rate: float, window: int, model: str | None, ask_every: int, pace: float = 0
) -> dict[str, Any]:
    """Push frames into a live view and ask now and then.

    Args:
        frames: Frames to push.
        fps: Frames due per second of the camera's time.
        rate: Frames per second of the camera's time.
        window: Frames that the view keeps.
        model: As VideoQA takes it.
        ask_every: Frames between questions.
        pace: Frames pushed per second of real time; 0: as fast as possible.

    Returns:
        "frames", "encoded", "dropped", "asked", "right": counts. "seconds", "slowest_push": seconds.
        "samples": dicts of pushed, seconds, memory (bytes), lag (seconds) and kept.
    """
    pictures = clip_frames(sample_scene_for_the_readme(), np.random.default_rng(1))
    qa = VideoQA(model, device="cpu")
    samples = list[dict[str, float]]()
    right = asked = 0
    slowest = 0.0
    started = time.perf_counter()
    with qa.live(fps=fps, window=window) as live:
        for i in range(frames):
            pushing = time.perf_counter()
            live.push(pictures[i % len(pictures)], i / rate)
            slowest = max(slowest, time.perf_counter() - pushing)
            if pace:
                time.sleep(max(started + i / pace - time.perf_counter(), 0))
            elif i % 250 == 249:
                time.sleep(0.001)  # lets other threads of this process run, as the pauses of a camera do
            if i % ask_every == ask_every - 1:
                right += live.ask("What color is the circle?", last=2.0, wait=30).text == "red"
                asked += 1
            if i % max(1, frames // SAMPLES) == 0:
                samples.append({"pushed": i, "seconds": time.perf_counter() - started, **_sample(live)})
        status = live.status
    return {
        "frames": frames,
        "seconds": time.perf_counter() - started,
        "encoded": status.encoded,
        "dropped": status.dropped,
        "asked": asked,
        "right": right,
        "slowest_push": slowest,
        "samples": samples,
    }


def _sample(live: Live) -> dict[str, float]:
    status = live.status
    return {"memory": resident_memory(), "lag": status.lag, "kept": status.kept}


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot memory and lag over the frames pushed.

    Args:
        report: The report of `soak`.
        path: Where the PNG goes.

    Raises:
        PPLLaVAError: If matplotlib is missing or the file can't be written.
    """
    plt = import_pyplot()
    samples = report["samples"]
    pushed = [sample["pushed"] for sample in samples]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, layout="constrained")
    top.plot(pushed, [sample["memory"] / 1e6 for sample in samples], color="#4477aa")
    top.set_ylabel("resident memory, MB")
    top.set_ylim(0)
    bottom.plot(pushed, [1000 * sample["lag"] for sample in samples], color="#cc6677", linewidth=0.8)
    bottom.set_ylabel("lag of the last frame, ms")
    counts = f"{report['encoded']} encoded, {report['dropped']} dropped, {report['seconds']:.0f} s"
    bottom.set_xlabel(f"frames pushed ({counts})")
    bottom.set_ylim(0)
    save_figure(figure, path, dpi=120)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--frames",
    type=click.IntRange(1000, 10**8),
    default=100_000,
    show_default=True,
    help="Frames to push.",
)
@click.option(
    "--fps",
    type=float,
    default=10.0,
    show_default=True,
    help="Frames due per second of the camera's time.",
)
@click.option(
    "--rate", type=float, default=20.0, show_default=True, help="Frames per second of the camera's time."
)
@click.option("--window", type=int, default=64, show_default=True, help="Frames that the view keeps.")
@click.option(
    "--ask-every", type=click.IntRange(1), default=2000, show_default=True, help="Frames between questions."
)
@click.option(
    "--pace",
    type=float,
    default=0.0,
    help="Frames pushed per second of real time.  [default: as fast as possible]",
)
@click.option("--model", metavar="BUNDLE", help="A bundle of nano's instead of the packed one.")
@click.option("--plot", metavar="PNG", help="Draw memory and lag.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(plot: str | None, as_json: bool, **options: Any) -> None:
    """Push frames into a live view, and watch memory and lag."""
    report = soak(**options)
    if plot:
        draw(report, Path(plot))
    if as_json:
        print(json.dumps(report))
        return
    memory = [sample["memory"] / 1e6 for sample in report["samples"]]
    lag = [1000 * sample["lag"] for sample in report["samples"]]
    tenth = max(len(memory) // 10, 1)
    lags = f"{np.median(lag):.1f}, {np.percentile(lag, 99):.1f}, {max(lag):.1f}"
    rows = [
        ("pushed, encoded, dropped", f"{report['frames']}, {report['encoded']}, {report['dropped']}"),
        ("seconds", f"{report['seconds']:.1f}"),
        ("memory after the first and the last tenth, MB", f"{memory[tenth]:.1f}, {memory[-1]:.1f}"),
        ("lag, ms: median, 99 %, maximum", lags),
        ("slowest push, ms", f"{1000 * report['slowest_push']:.1f}"),
        ("questions, right", f"{report['asked']}, {report['right']}"),
    ]
    table("live soak", ("what", "value"), rows)


if __name__ == "__main__":
    main()
