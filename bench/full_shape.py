"""The full shape, end to end, beside torch eager: time and memory of export and of one answer.

    python -m ppllava_edge.bench.full_shape FOLDER [--shape vit-l-336] [--precision fp32]

Writes a random checkpoint into FOLDER (kept, and used again), exports it, answers about a video of 32 frames with the runtime and with the
original algorithm in torch, float32, in turns, each in a process of its own so that peak memory is each one's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from ppllava_edge.bench.models.random_checkpoint import SHAPES, write_random_checkpoint
from ppllava_edge.engines.machine.memory import peak_memory
from ppllava_edge.engines.terminal import Command, human_bytes, table

STAGES = ("video_decode", "vision", "question", "pooling", "prefill", "generate")
QUESTION = "What happens in the video, and where does the red car go after it turned left?"


def write_test_video(path: Path) -> None:
    """Ten seconds of moving noise at 640x360."""
    from ppllava_edge.runtime.media.writing import write_video

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (100, 9, 16, 3), dtype=np.uint8)
    write_video(path, coarse.repeat(40, 1).repeat(40, 2), fps=10)


def run_child(arguments: list[str]) -> tuple[dict, float, int]:
    """Run one of this module's jobs in a fresh process → (its JSON, wall seconds, peak resident bytes)."""
    started = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "ppllava_edge.bench.full_shape", *arguments], stdout=subprocess.PIPE, text=True
    )
    if run.returncode:
        sys.exit(run.returncode)
    found = json.loads(run.stdout.strip().splitlines()[-1])
    return found, time.perf_counter() - started, found["peak"]


def job_export(checkpoint: str, bundle: str, precision: str) -> dict:
    from ppllava_edge.export.cli import main as export

    export([checkpoint, "-o", bundle, "--precision", precision, "--force"], standalone_mode=False)
    return {}


def job_run(bundle: str, video: str, frames: str, new_tokens: str) -> dict:
    """The runtime: timings of a first and a second question, and the token ids of the answer."""
    from ppllava_edge.runtime.video_qa import VideoQA

    opening = time.perf_counter()
    qa = VideoQA(bundle, device="cpu")
    qa.pipeline.load()
    load = time.perf_counter() - opening
    opened = qa.open(video, frames=int(frames))
    first = opened.ask(QUESTION, max_new_tokens=int(new_tokens))
    second = opened.ask(QUESTION, max_new_tokens=int(new_tokens))
    pipeline, text = qa.pipeline, qa.text
    visual = pipeline.visual_tokens(opened.features, pipeline.encode_question(text.question_ids(QUESTION)[0]))
    before, after = (pipeline.embed_tokens(piece) for piece in text.prompt_pieces(QUESTION))
    ids = list(pipeline.generate(np.concatenate([before, visual, after]), int(new_tokens)))
    return {"load": load, "timings": first.timings, "again": second.timings, "ids": ids}


def job_torch(checkpoint: str, bundle: str, video: str, frames: str, new_tokens: str) -> dict:
    """The original algorithm on the very same pixels and token ids."""
    import torch

    from ppllava_edge.bench.models.torch_eager import TorchModel, answer
    from ppllava_edge.engines.bundle.bundle import Bundle
    from ppllava_edge.runtime.language.text_processor import TextProcessor
    from ppllava_edge.runtime.vision.frame_choice import read_frames
    from ppllava_edge.runtime.vision.preprocess import preprocess_video

    opened = Bundle.open(bundle)
    started = time.perf_counter()
    read = read_frames(video, int(frames))
    pixels = torch.from_numpy(preprocess_video(read.images, opened.manifest.preprocessing))
    decoded = time.perf_counter() - started
    text = TextProcessor(opened)
    before, after = text.prompt_pieces(QUESTION)
    question = torch.from_numpy(text.question_ids(QUESTION)[0])
    started = time.perf_counter()
    model = TorchModel(Path(checkpoint))
    load = time.perf_counter() - started
    ids, timings = answer(model, pixels, question, torch.tensor(before), torch.tensor(after), int(new_tokens))
    return {"load": load, "timings": {"video_decode": decoded, **timings}, "ids": ids}


JOBS: dict[str, Callable[..., dict]] = {"export": job_export, "run": job_run, "torch": job_torch}


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="vit-l-336", show_default=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--frames", type=int, default=32, show_default=True)
@click.option("--new-tokens", type=int, default=16, show_default=True)
@click.option("--no-torch", is_flag=True, help="Only the runtime.")
@click.option("--json", "as_json", is_flag=True)
def main(
    folder: Path, shape: str, precision: str, frames: int, new_tokens: int, no_torch: bool, as_json: bool
) -> None:
    """Measure export and one answer at the full shape."""
    checkpoint, bundle, video = (
        folder / "checkpoint",
        folder / f"bundle-{precision.replace('=', '-')}",
        folder / "noise.mp4",
    )
    folder.mkdir(parents=True, exist_ok=True)
    if not (checkpoint / "config.json").exists():
        write_random_checkpoint(checkpoint, SHAPES[shape])
    if not video.exists():
        write_test_video(video)
    _, export_seconds, export_peak = run_child(["export", str(checkpoint), str(bundle), precision])
    ours, _, our_peak = run_child(["run", str(bundle), str(video), str(frames), str(new_tokens)])
    found = {
        "export_seconds": export_seconds,
        "export_peak_bytes": export_peak,
        "ours": ours,
        "ours_peak_bytes": our_peak,
    }
    if not no_torch:
        theirs, _, their_peak = run_child(
            ["torch", str(checkpoint), str(bundle), str(video), str(frames), str(new_tokens)]
        )
        found |= {"torch": theirs, "torch_peak_bytes": their_peak, "same_ids": ours["ids"] == theirs["ids"]}
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = []
    for name in ("load", *STAGES):
        mine = ours["load"] if name == "load" else ours["timings"][name]
        again = 0.0 if name == "load" else ours["again"][name]
        other = None if no_torch else (theirs["load"] if name == "load" else theirs["timings"][name])
        rows.append(
            (
                name,
                f"{mine:.2f}",
                f"{again:.2f}",
                "" if other is None else f"{other:.2f}",
                "" if not other else f"{other / max(mine, 1e-9):.1f}",
            )
        )
    table(
        f"{shape} at {precision}, {frames} frames, {new_tokens} tokens, seconds",
        ("stage", "runtime", "next ask", "torch eager fp32", "ratio"),
        rows,
    )
    facts = [
        ("export", f"{export_seconds:.1f} s, peak {human_bytes(export_peak)}"),
        ("runtime peak memory", human_bytes(our_peak)),
    ]
    if not no_torch:
        facts += [("torch peak memory", human_bytes(their_peak)), ("same token ids", str(found["same_ids"]))]
    table("", ("what", "value"), facts)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in JOBS:
        result = JOBS[sys.argv[1]](*sys.argv[2:])
        print(json.dumps({**result, "peak": peak_memory()}))
    else:
        main()
