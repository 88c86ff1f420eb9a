"""ppllava-bench: how long every stage of a bundle takes here."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.machine.memory import peak_memory
from ppllava_edge.engines.terminal import Command, human_bytes, table

_COLD = "import sys, ppllava_edge.runtime as r; r.Pipeline.open(sys.argv[1], device=sys.argv[2]).load()"


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", required=False)
@click.option(
    "--runs",
    type=click.IntRange(1, 10000),
    default=20,
    show_default=True,
    help="Measured runs of every stage.",
)
@click.option(
    "--warmup", type=click.IntRange(0, 1000), default=3, show_default=True, help="Runs before measuring."
)
@click.option("--frames", type=click.IntRange(1, 4096), help="Frames of the clip.  [default: the model's]")
@click.option(
    "--text-tokens",
    type=click.IntRange(1, 100000),
    default=32,
    show_default=True,
    help="Tokens of the prompt beside the visual ones.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(2, 100000),
    default=32,
    show_default=True,
    help="Tokens generated in every run.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="auto, onnxruntime, tensorrt, rtx, standard, or a target of ppllava-build.",
)
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads of the engine.  [default: one per core]"
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--plot", metavar="PNG", help="Draw the stages' times.")
def main(bundle: str | None, as_json: bool, plot: str | None, **options: Any) -> None:
    """Measure BUNDLE (default: the packed demonstration model): seconds per stage, tokens per second, memory, cold start."""
    if bundle is None:
        from ppllava_edge.engines.bundle.packed import packed_bundle

        bundle = str(packed_bundle())
    found = measure(bundle, **options)
    if plot:
        draw_plot(found, Path(plot))
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = [
        (name, *(f"{1000 * s[p]:.2f}" for p in ("p50", "p95", "p99", "least")))
        for name, s in found["stages"].items()
    ]
    table(
        f"{found['model']}: {found['frames']} frames, {found['visual_tokens']} visual tokens, ms",
        ("stage", "p50", "p95", "p99", "least"),
        rows,
    )
    facts = [
        ("tokens/s", f"{found['tokens_per_second']:.1f}"),
        ("decoder weights read", f"{found['decode_gb_per_second']:.1f} GB/s"),
        ("copy bandwidth here", f"{found['copy_gb_per_second']:.1f} GB/s"),
        ("cold start", f"{found['cold_start_seconds']:.2f} s from process start to all stages open"),
        ("peak memory", human_bytes(found["peak_memory_bytes"])),
        ("engine", found["engine"]),
        ("machine", found["machine"]),
    ]
    table("", ("what", "value"), facts)


def measure(
    bundle: str,
    runs: int,
    warmup: int,
    frames: int | None,
    text_tokens: int,
    new_tokens: int,
    device: str,
    threads: int | None,
    engine: str = "auto",
) -> dict[str, Any]:
    """Run every stage `runs` times on random input. Seconds throughout; bytes for memory."""
    from ppllava_edge.runtime.pipeline.factory import Pipeline

    p = Pipeline.open(bundle, device, threads, engine)
    cold = _cold_start(bundle, p.device)
    m, random = p.manifest, np.random.default_rng(0)
    count = frames or m.vision.default_frames
    p.check_frames(count)
    pixels = random.standard_normal((count, 3, m.vision.image_size, m.vision.image_size)).astype(np.float32)
    ids = random.integers(0, min(m.decoder.vocab, 1000), text_tokens)
    samples: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        p.wait()
        samples.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def once() -> int:
        states = timed("trunk", lambda: p.encode_trunk(pixels))
        features = timed("temporal branch", lambda: p.branch(states))
        q, weights = None, None
        if m.pooling.guided:
            tokens = random.integers(
                0,
                min(m.decoder.vocab, 1000),
                (1, 16 if not m.question or not m.question.padded else m.question.length),
            )
            q = timed("question", lambda: p.encode_question(tokens))
            weights = timed("similarity", lambda: p.window_weights(features, q))
        visual = timed("pooling", lambda: p.visual_tokens(features, q, weights=weights))
        answer = p.generate(p.prompt([], visual, ids.tolist()), new_tokens)
        timed("prefill", lambda: next(answer))
        for _ in range(new_tokens - 1):
            timed("decode, a token", lambda: next(answer))
        answer.close()
        return len(visual)

    for _ in range(warmup):
        once()
    samples.clear()
    tokens = 0
    for _ in range(runs):
        tokens = once()
    asks = ("question", "similarity", "pooling", "prefill")
    again = [sum(values) for values in zip(*(samples[name] for name in asks if name in samples))]
    vision = [a + b for a, b in zip(samples["trunk"], samples["temporal branch"])]
    samples["first token, first ask"] = [a + b for a, b in zip(vision, again)]
    samples["first token, next ask"] = again
    peak = peak_memory()  # before the bandwidth is measured, which takes memory of its own
    per_second = 1 / float(np.median(samples["decode, a token"]))
    weights_bytes = sum(f.bytes for n, f in m.files.items() if n.startswith("decoder.onnx"))
    return {
        "model": m.name,
        "bundle": str(bundle),
        "device": p.device,
        "frames": count,
        "visual_tokens": tokens,
        "text_tokens": text_tokens,
        "new_tokens": new_tokens,
        "runs": runs,
        "stages": {name: percentiles(values) for name, values in samples.items()},
        "tokens_per_second": per_second,
        "decode_gb_per_second": per_second * weights_bytes / 1e9,
        "copy_gb_per_second": copy_bandwidth(),
        "cold_start_seconds": cold,
        "peak_memory_bytes": peak,
        "engine": _engine(p, threads),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def _engine(p: Any, threads: int | None) -> str:
    """What ran: "cpu (ONNX Runtime 1.31.1, 2 threads)"."""
    if p.engine is not None and p.engine.library != "onnxruntime":
        return f"{p.engine_name} ({', '.join(f'{tool} {version}' for tool, version in p.engine.made_by.items())})"
    from ppllava_edge.engines.libraries import import_onnxruntime

    return f"{p.engine_name} (ONNX Runtime {import_onnxruntime().__version__}, {threads or os.cpu_count()} threads)"


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95, p99, mean and the least."""
    p50, p95, p99 = (float(np.percentile(values, q)) for q in (50, 95, 99))
    return {"p50": p50, "p95": p95, "p99": p99, "mean": float(np.mean(values)), "least": min(values)}


def copy_bandwidth(size: int = 256 << 20) -> float:
    """GB/s of a large copy, read and write counted: the roof of whatever reads its weights once."""
    source, target = np.ones(size // 8), np.empty(size // 8)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * size / (time.perf_counter() - started) / 1e9)
    return best


def _cold_start(bundle: str, device: str) -> float:
    started = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", _COLD, bundle, device], capture_output=True, text=True)
    if run.returncode:
        raise PPLLaVAError(
            f"a fresh process could not open {bundle}: {run.stderr.strip().splitlines()[-1] if run.stderr.strip() else 'no reason given'}"
        )
    return time.perf_counter() - started


def draw_plot(found: dict[str, Any], path: Path) -> None:
    """Bars of p50 with whiskers to p99, per stage. Raises PPLLaVAError if matplotlib is missing or the file can't be written."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise PPLLaVAError("--plot needs matplotlib: pip install 'ppllava-edge[plot]'") from None
    stages = found["stages"]
    middle = np.array([1000 * s["p50"] for s in stages.values()])
    high = np.array([1000 * s["p99"] for s in stages.values()])
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(stages) + 1.4), layout="constrained")
    axes.barh(
        list(stages),
        middle,
        xerr=[np.zeros_like(middle), high - middle],
        color="#4477aa",
        ecolor="#222222",
        capsize=3,
    )
    for y, value in enumerate(middle):
        axes.annotate(f" {value:.2f}", (value, y), va="bottom", fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds, p50 (whisker: p99)")
    axes.set_title(
        f"{found['model']}: {found['frames']} frames, {found['visual_tokens']} visual tokens, {found['device']}",
        fontsize=10,
    )
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png", dpi=130)
        part.replace(path)
    except OSError as error:
        raise PPLLaVAError(f"can't write {path}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
        plt.close(figure)


if __name__ == "__main__":
    main()
