"""A live view for a long time: frames pushed faster than they can be encoded, memory and lag all along.

python -m ppllava_edge.bench.live_soak --frames 100000 --fps 20 --pace 500 --plot soak.png
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.machine.memory import resident_memory
from ppllava_edge.engines.terminal import Command, table


def soak(
    frames: int, fps: float, rate: float, window: int, model: str | None, ask_every: int, pace: float = 0
) -> dict[str, Any]:
    """Push `frames` frames with the times of a camera of `rate` frames a second, `fps` of which are due; ask now and then. pace: frames pushed
    a second of real time; 0: as many as can be. Samples: pushed, seconds, memory (bytes), lag (seconds), kept."""
    from ppllava_edge.nano.clips import clip_frames, sample_scene_for_the_readme
    from ppllava_edge.runtime.video_qa import VideoQA

    pictures = clip_frames(sample_scene_for_the_readme(), np.random.default_rng(1))
    qa, samples, right, asked, slowest = VideoQA(model, device="cpu"), list[dict[str, float]](), 0, 0, 0.0
    began = time.perf_counter()
    with qa.live(fps=fps, window=window) as live:
        for i in range(frames):
            pushing = time.perf_counter()
            live.push(pictures[i % len(pictures)], i / rate)
            slowest = max(slowest, time.perf_counter() - pushing)
            if pace:
                time.sleep(max(began + i / pace - time.perf_counter(), 0))
            elif i % 250 == 249:
                time.sleep(0.001)  # lets other threads of this process in, as a camera's pauses would
            if i % ask_every == ask_every - 1:
                right, asked = (
                    right + (live.ask("What color is the circle?", last=2.0, wait=30).text == "red"),
                    asked + 1,
                )
            if i % max(1, frames // 400) == 0:
                s = live.status
                samples.append(
                    {
                        "pushed": i,
                        "seconds": time.perf_counter() - began,
                        "memory": resident_memory(),
                        "lag": s.lag,
                        "kept": s.kept,
                    }
                )
        status = live.status
    return {
        "frames": frames,
        "seconds": time.perf_counter() - began,
        "encoded": status.encoded,
        "dropped": status.dropped,
        "asked": asked,
        "right": right,
        "slowest_push": slowest,
        "samples": samples,
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Memory and lag over the frames pushed. Raises PPLLaVAError if matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise PPLLaVAError("--plot needs matplotlib: pip install 'ppllava-edge[plot]'") from None
    x = [s["pushed"] for s in found["samples"]]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, layout="constrained")
    top.plot(x, [s["memory"] / 1e6 for s in found["samples"]], color="#4477aa")
    top.set_ylabel("resident memory, MB")
    top.set_ylim(0)
    bottom.plot(x, [1000 * s["lag"] for s in found["samples"]], color="#cc6677", linewidth=0.8)
    bottom.set_ylabel("lag of the last frame, ms")
    bottom.set_xlabel(
        f"frames pushed ({found['encoded']} encoded, {found['dropped']} passed over, {found['seconds']:.0f} s)"
    )
    bottom.set_ylim(0)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=120)
    part.replace(path)
    plt.close(figure)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--frames", type=click.IntRange(1000, 10**8), default=100_000, show_default=True)
@click.option(
    "--fps", type=float, default=10.0, show_default=True, help="Frames due a second of the camera's time."
)
@click.option(
    "--rate", type=float, default=20.0, show_default=True, help="Frames a second of the camera's time."
)
@click.option("--window", type=int, default=64, show_default=True)
@click.option(
    "--ask-every", type=click.IntRange(1), default=2000, show_default=True, help="Frames between questions."
)
@click.option(
    "--pace",
    type=float,
    default=0.0,
    help="Frames pushed a second of real time.  [default: as many as can be]",
)
@click.option("--model", metavar="BUNDLE")
@click.option("--plot", metavar="PNG")
@click.option("--json", "as_json", is_flag=True)
def main(
    frames: int,
    fps: float,
    rate: float,
    window: int,
    ask_every: int,
    pace: float,
    model: str | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """Push frames, watch memory and lag."""
    found = soak(frames, fps, rate, window, model, ask_every, pace)
    if plot:
        draw(found, Path(plot))
    if as_json:
        print(json.dumps(found))
        return
    memory, lag = [s["memory"] / 1e6 for s in found["samples"]], [1000 * s["lag"] for s in found["samples"]]
    tenth = max(len(memory) // 10, 1)
    rows = [
        ("pushed, encoded, passed over", f"{frames}, {found['encoded']}, {found['dropped']}"),
        ("seconds", f"{found['seconds']:.1f}"),
        ("memory after the first and the last tenth, MB", f"{memory[tenth]:.1f}, {memory[-1]:.1f}"),
        (
            "lag, ms: median, 99 %, most",
            f"{np.median(lag):.1f}, {np.percentile(lag, 99):.1f}, {max(lag):.1f}",
        ),
        ("slowest push, ms", f"{1000 * found['slowest_push']:.1f}"),
        ("questions, right", f"{found['asked']}, {found['right']}"),
    ]
    table("live soak", ("what", "value"), rows)


if __name__ == "__main__":
    main()
