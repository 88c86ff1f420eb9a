"""The full shape, end to end, compared with torch eager: time and memory of the export and of one answer.

    python -m ppllava_edge.bench.full_shape FOLDER [--shape vit-l-336] [--precision fp32]

Writes a random checkpoint into FOLDER (kept, and used again), exports it, and answers about a video of 32
frames with the runtime and with the original algorithm in torch, float32. Each part runs in a process of its
own, so that peak memory is measured separately.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.bench.measuring.child_process import run_json
from ppllava_edge.bench.models.random_checkpoint import SHAPES, write_random_checkpoint
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.machine.memory import peak_memory
from ppllava_edge.engines.terminal import Command, human_bytes, table
from ppllava_edge.runtime.language.text_processor import TextProcessor
from ppllava_edge.runtime.media.writing import write_video
from ppllava_edge.runtime.video_qa import VideoQA
from ppllava_edge.runtime.vision.frame_choice import read_frames
from ppllava_edge.runtime.vision.preprocess import preprocess_video

STAGES = ("video_decode", "vision", "question", "pooling", "prefill", "generate")
QUESTION = "What happens in the video, and where does the red car go after it turned left?"


def write_test_video(path: Path) -> None:
    """Write ten seconds of moving noise at 640x360."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (100, 9, 16, 3), dtype=np.uint8)
    write_video(path, coarse.repeat(40, 1).repeat(40, 2), fps=10)


def run_job(*arguments: object) -> tuple[dict[str, Any], float]:
    """Run one of JOBS in a fresh process. Returns its JSON (with "peak", bytes) and wall seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "ppllava_edge.bench.full_shape", *map(str, arguments)]
    return run_json(command, show_errors=True), time.perf_counter() - started


def job_export(checkpoint: str, bundle: str, precision: str) -> dict[str, Any]:
    """Export the checkpoint."""
    # Imported here, because the exporter's libraries would count in the runtime's peak memory.
    from ppllava_edge.export.cli import main as export_command

    export_command([checkpoint, "-o", bundle, "--precision", precision, "--force"], standalone_mode=False)
    return {}


def job_run(bundle: str, video: str, frames: str, new_tokens: str) -> dict[str, Any]:
    """Answer with the runtime.

    Returns:
        Seconds: "load", and by stage "timings" of the first and "again" of the second question. "ids": the
        answer's token ids.
    """
    started = time.perf_counter()
    qa = VideoQA(bundle, device="cpu")
    qa.pipeline.load()
    load = time.perf_counter() - started
    opened = qa.open(video, frames=int(frames))
    first = opened.ask(QUESTION, max_new_tokens=int(new_tokens))
    second = opened.ask(QUESTION, max_new_tokens=int(new_tokens))
    pipeline, text = qa.pipeline, qa.text
    visual = pipeline.visual_tokens(opened.features, pipeline.encode_question(text.question_ids(QUESTION)[0]))
    before, after = (pipeline.embed_tokens(piece) for piece in text.prompt_pieces(QUESTION))
    ids = list(pipeline.generate(np.concatenate([before, visual, after]), int(new_tokens)))
    return {"load": load, "timings": first.timings, "again": second.timings, "ids": ids}


def job_torch(checkpoint: str, bundle: str, video: str, frames: str, new_tokens: str) -> dict[str, Any]:
    """Answer with the original algorithm, on the same pixels and token ids.

    Returns:
        As job_run, without "again".
    """
    import torch

    from ppllava_edge.bench.models.torch_eager import TorchModel, answer

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


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"export": job_export, "run": job_run, "torch": job_torch}


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--shape",
    type=click.Choice(sorted(SHAPES)),
    default="vit-l-336",
    show_default=True,
    help="Size of the model.",
)
@click.option("--precision", default="fp32", show_default=True, help="As for ppllava-export.")
@click.option("--frames", type=int, default=32, show_default=True, help="Frames of the clip.")
@click.option("--new-tokens", type=int, default=16, show_default=True, help="Tokens of the answer.")
@click.option("--no-torch", is_flag=True, help="Only the runtime.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(
    folder: Path, shape: str, precision: str, frames: int, new_tokens: int, no_torch: bool, as_json: bool
) -> None:
    """Measure the export and one answer at the full shape, working in FOLDER."""
    checkpoint, video = folder / "checkpoint", folder / "noise.mp4"
    bundle = folder / f"bundle-{precision.replace('=', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (checkpoint / "config.json").exists():
        write_random_checkpoint(checkpoint, SHAPES[shape])
    if not video.exists():
        write_test_video(video)
    exported, export_seconds = run_job("export", checkpoint, bundle, precision)
    ours, _ = run_job("run", bundle, video, frames, new_tokens)
    report = {
        "export_seconds": export_seconds,
        "export_peak_bytes": exported["peak"],
        "ours": ours,
        "ours_peak_bytes": ours["peak"],
    }
    if not no_torch:
        torch, _ = run_job("torch", checkpoint, bundle, video, frames, new_tokens)
        same_ids = ours["ids"] == torch["ids"]
        report |= {"torch": torch, "torch_peak_bytes": torch["peak"], "same_ids": same_ids}
    if as_json:
        click.echo(json.dumps(report))
    else:
        show(report, f"{shape} at {precision}, {frames} frames, {new_tokens} tokens, seconds")


def show(report: dict[str, Any], title: str) -> None:
    """Print a report as two tables: seconds by stage, and memory."""
    ours, torch = report["ours"], report.get("torch")
    rows = [_row("load", ours["load"], 0.0, torch and torch["load"])]
    for stage in STAGES:
        theirs = torch and torch["timings"][stage]
        rows.append(_row(stage, ours["timings"][stage], ours["again"][stage], theirs))
    table(title, ("stage", "runtime", "next ask", "torch eager fp32", "ratio"), rows)
    export_peak = human_bytes(report["export_peak_bytes"])
    facts = [
        ("export", f"{report['export_seconds']:.1f} s, peak {export_peak}"),
        ("runtime peak memory", human_bytes(report["ours_peak_bytes"])),
    ]
    if torch:
        facts.append(("torch peak memory", human_bytes(report["torch_peak_bytes"])))
        facts.append(("same token ids", str(report["same_ids"])))
    table("", ("what", "value"), facts)


def _row(stage: str, ours: float, again: float, theirs: float | None) -> tuple[str, ...]:
    """A row of the table of seconds; theirs: torch's, None if it didn't run."""
    cells = (stage, f"{ours:.2f}", f"{again:.2f}")
    if theirs is None:
        return (*cells, "", "")
    return (*cells, f"{theirs:.2f}", f"{theirs / max(ours, 1e-9):.1f}" if theirs else "")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in JOBS:
        result = JOBS[sys.argv[1]](*sys.argv[2:])
        print(json.dumps({**result, "peak": peak_memory()}))
    else:
        main()
