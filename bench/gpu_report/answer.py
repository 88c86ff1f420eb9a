"""Time a whole answer at a full shape, with random weights at fp16 and int4, and in torch on the same GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ppllava_edge.bench.gpu_report.timing import copy_bandwidth
from ppllava_edge.bench.measuring.stages import measure
from ppllava_edge.bench.models.random_checkpoint import SHAPES, write_random_checkpoint
from ppllava_edge.engines.terminal import table

EXPORT_OPTIONS = {"fp16": ["--precision", "fp16"], "int4": ["--precision", "int4", "--weight-only"]}
TORCH_STAGES = ("vision", "question", "pooling", "prefill")  # before the first token
SAME_STAGES = ("prefill", "question")  # stages that the runtime and torch both have
RUN_MODULE = """
import runpy, sys
path, module, *arguments = sys.argv[1:]
sys.path[:0] = path.split(":")
sys.argv[1:] = arguments
runpy.run_module(f"ppllava_edge.{module}", run_name="__main__", alter_sys=True)
"""


def answer_report(
    folder: Path,
    shape: str,
    frames: int,
    text_tokens: int,
    new_tokens: int,
    runs: int,
    with_torch: bool = True,
) -> dict[str, Any]:
    """Export a random checkpoint, build engines/cuda and time every stage.

    Args:
        folder: Folder that keeps the checkpoint and the bundles.
        shape: One of SHAPES.
        frames: Frames of the clip.
        text_tokens: Tokens of the prompt beside the visual ones.
        new_tokens: Tokens to generate.
        runs: Measured runs.
        with_torch: Run the original algorithm too.

    Returns:
        "fp16", "int4": as bench.measuring.stages.measure. "torch": as torch_answer.
    """
    checkpoint = folder / "checkpoint"
    report = dict[str, Any]()
    if not (checkpoint / "config.json").exists():
        write_random_checkpoint(checkpoint, SHAPES[shape])
    for precision, options in EXPORT_OPTIONS.items():
        bundle = folder / precision
        if not (bundle / "engines" / "cuda").exists():
            _run_command("export.cli", [str(checkpoint), "-o", str(bundle), "--no-engine", *options])
            _run_command("engines.cli.build", [str(bundle), "--target", "cuda"])
        report[precision] = measure(
            str(bundle), runs, 1, frames, text_tokens, new_tokens, "cuda", None, "onnxruntime"
        )
    if with_torch:
        report["torch"] = torch_answer(checkpoint, frames, text_tokens, new_tokens)
    return report


def _run_command(module: str, arguments: list[str]) -> None:
    """Run one of our commands in a fresh process, which finds the package where this one did."""
    command = [sys.executable, "-c", RUN_MODULE, ":".join(sys.path), module, *arguments]
    status = subprocess.run(command).returncode
    if status:
        sys.exit(status)


def torch_answer(
    checkpoint: Path, frames: int, text_tokens: int, new_tokens: int, device: str = "cuda"
) -> dict[str, Any]:
    """Answer with the original algorithm in float16: eager, and with the decoder's step compiled.

    Returns:
        "eager", "compiled": "timings" (stage → seconds), "seconds" (all together), "tokens_per_second".
        "copy_gb_per_second" on a GPU.
    """
    import torch

    from ppllava_edge.bench.models.torch_eager import TorchModel, answer

    model = TorchModel(checkpoint, dtype=torch.float16, device=device)
    size = model.config["vision_config"]["image_size"]
    pixels = torch.randn(frames, 3, size, size, device=device, dtype=torch.float16)
    text = torch.arange(1, text_tokens + 1, device=device)
    question = torch.arange(1, 17, device=device)[None]
    report: dict[str, Any] = {}
    for name in ("eager", "compiled"):
        if name == "compiled":
            torch._dynamo.config.recompile_limit = 256  # a weight's name is an argument in this model
            model.decode = torch.compile(model.decode, dynamic=True)  # type: ignore[method-assign]
        answer(model, pixels, question, text[:1], text[1:], new_tokens)
        started = time.perf_counter()
        _, timings = answer(model, pixels, question, text[:1], text[1:], new_tokens)
        report[name] = {
            "timings": timings,
            "seconds": time.perf_counter() - started,
            "tokens_per_second": (new_tokens - 1) / timings["generate"],
        }
    if device == "cuda":
        report["copy_gb_per_second"] = copy_bandwidth(torch) / 1e9
    return report


def show_answer(report: dict[str, Any]) -> None:
    """Print stages in milliseconds side by side, tokens per second, and the bandwidth of reading weights."""
    torch = report.get("torch", {})
    kinds = [kind for kind in ("eager", "compiled") if kind in torch]
    timings = [torch[kind]["timings"] for kind in kinds]
    ours = [report[precision] for precision in EXPORT_OPTIONS]
    rows: list[tuple[str, ...]] = []
    for stage in report["fp16"]["stages"]:
        cells = [f"{1000 * figures['stages'][stage]['p50']:.1f}" for figures in ours]
        cells += [f"{1000 * seconds[stage]:.1f}" if stage in SAME_STAGES else "" for seconds in timings]
        rows.append((stage, *cells))
    first = [f"{1000 * sum(seconds[stage] for stage in TORCH_STAGES):.1f}" for seconds in timings]
    rows.append(("first token, torch", "", "", *first))
    speeds = [*ours, *(torch[kind] for kind in kinds)]
    rows.append(("tokens/s", *(f"{figures['tokens_per_second']:.1f}" for figures in speeds)))
    copy = torch.get("copy_gb_per_second")
    rates = [_rate(figures["decode_gb_per_second"], copy) for figures in ours]
    rows.append(("weights read, GB/s", *rates, *("" for _ in kinds)))
    columns = ("stage", *EXPORT_OPTIONS, *(f"torch {kind} fp16" for kind in kinds))
    table("milliseconds unless said", columns, rows)


def _rate(gb_per_second: float, copy: float | None) -> str:
    share = f" = {100 * gb_per_second / copy:.0f} % of a copy" if copy else ""
    return f"{gb_per_second:.0f}{share}"
