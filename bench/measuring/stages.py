"""How long every stage of a bundle takes, on random input."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ppllava_edge.bench.measuring.child_process import last_line
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.libraries import import_onnxruntime
from ppllava_edge.engines.machine.memory import peak_memory
from ppllava_edge.runtime.pipeline.base import BasePipeline
from ppllava_edge.runtime.pipeline.factory import Pipeline

ASK_STAGES = ("question", "similarity", "pooling", "prefill")  # run for every question, in this order
OPEN_AND_LOAD = (
    "import sys, ppllava_edge.runtime as r; r.Pipeline.open(sys.argv[1], device=sys.argv[2]).load()"
)


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
    """Run every stage several times on random input.

    Args:
        bundle: The bundle's directory.
        runs: Measured runs.
        warmup: Runs before them.
        frames: Frames of the clip; None: the model's default.
        text_tokens: Tokens of the prompt beside the visual ones.
        new_tokens: Tokens generated in every run, 2 or more.
        device, threads, engine: As Pipeline.open takes them.

    Returns:
        Figures by name. "stages": stage → percentiles in seconds; "tokens_per_second",
        "decode_gb_per_second" (decoder weights read), "copy_gb_per_second", "cold_start_seconds",
        "peak_memory_bytes", and the parameters of the measurement.

    Raises:
        PPLLaVAError: If the bundle can't be opened or doesn't accept this number of frames.
    """
    pipeline = Pipeline.open(bundle, device, threads, engine)
    cold = cold_start(bundle, pipeline.device)
    run = _StageRun(pipeline, frames, text_tokens, new_tokens)
    for _ in range(warmup):
        run.once()
    run.samples.clear()
    visual_tokens = 0
    for _ in range(runs):
        visual_tokens = run.once()
    run.add_first_token_sums()
    peak = peak_memory()  # before copy_bandwidth, which allocates memory of its own
    tokens_per_second = 1 / float(np.median(run.samples["decode, a token"]))
    return {
        "model": pipeline.manifest.name,
        "bundle": str(bundle),
        "device": pipeline.device,
        "frames": run.frames,
        "visual_tokens": visual_tokens,
        "text_tokens": text_tokens,
        "new_tokens": new_tokens,
        "runs": runs,
        "stages": {name: percentiles(seconds) for name, seconds in run.samples.items()},
        "tokens_per_second": tokens_per_second,
        "decode_gb_per_second": tokens_per_second * _decoder_bytes(pipeline) / 1e9,
        "copy_gb_per_second": copy_bandwidth(),
        "cold_start_seconds": cold,
        "peak_memory_bytes": peak,
        "engine": _engine_line(pipeline, threads),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


class _StageRun:
    """One pass after another through all stages. samples: stage → seconds of every run."""

    def __init__(self, pipeline: BasePipeline, frames: int | None, text_tokens: int, new_tokens: int):
        self.pipeline, self.new_tokens = pipeline, new_tokens
        self.samples: dict[str, list[float]] = {}
        vision = pipeline.manifest.vision
        self.frames = frames or vision.default_frames
        pipeline.check_frames(self.frames)
        self.random = np.random.default_rng(0)
        shape = (self.frames, 3, vision.image_size, vision.image_size)
        self.pixels = self.random.standard_normal(shape).astype(np.float32)
        self.text_ids = self._random_ids(text_tokens)

    def once(self) -> int:
        """Run every stage once, from pixels to the last token. Returns the number of visual tokens."""
        pipeline = self.pipeline
        states = self._timed("trunk", lambda: pipeline.encode_trunk(self.pixels))
        features = self._timed("temporal branch", lambda: pipeline.branch(states))
        question, weights = None, None
        if pipeline.manifest.pooling.guided:
            ids = self._question_ids()
            question = self._timed("question", lambda: pipeline.encode_question(ids))
            weights = self._timed("similarity", lambda: pipeline.window_weights(features, question))
        visual = self._timed("pooling", lambda: pipeline.visual_tokens(features, question, weights=weights))
        answer = pipeline.generate(pipeline.prompt([], visual, self.text_ids.tolist()), self.new_tokens)
        self._timed("prefill", lambda: next(answer))
        for _ in range(self.new_tokens - 1):
            self._timed("decode, a token", lambda: next(answer))
        answer.close()
        return len(visual)

    def add_first_token_sums(self) -> None:
        """Add the time to the first token: with encoding the video, and for a further question about it."""
        stages = [self.samples[name] for name in ASK_STAGES if name in self.samples]
        next_ask = [sum(seconds) for seconds in zip(*stages)]
        vision = [a + b for a, b in zip(self.samples["trunk"], self.samples["temporal branch"])]
        self.samples["first token, first ask"] = [a + b for a, b in zip(vision, next_ask)]
        self.samples["first token, next ask"] = next_ask

    def _timed(self, name: str, stage: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = stage()
        self.pipeline.wait()
        self.samples.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def _question_ids(self) -> np.ndarray:
        """Ids (1, L): the full length where the question tower wants padding, else 16."""
        question = self.pipeline.manifest.question
        return self._random_ids((1, question.length if question and question.padded else 16))

    def _random_ids(self, shape: int | tuple[int, int]) -> np.ndarray:
        return self.random.integers(0, min(self.pipeline.manifest.decoder.vocab, 1000), shape)


def _decoder_bytes(pipeline: BasePipeline) -> int:
    """Bytes of the decoder's graph and weights, which every token reads."""
    files = pipeline.manifest.files.items()
    return sum(entry.bytes for name, entry in files if name.startswith("decoder.onnx"))


def _engine_line(pipeline: BasePipeline, threads: int | None) -> str:
    """The engine in words: "cpu (ONNX Runtime 1.31.1, 2 threads)"."""
    name, engine = pipeline.engine_name, pipeline.engine
    if engine is not None and engine.library != "onnxruntime":
        return f"{name} ({', '.join(f'{tool} {version}' for tool, version in engine.made_by.items())})"
    version = import_onnxruntime().__version__
    return f"{name} (ONNX Runtime {version}, {threads or os.cpu_count()} threads)"


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95, p99, mean and the smallest value ("least")."""
    p50, p95, p99 = (float(np.percentile(values, q)) for q in (50, 95, 99))
    return {"p50": p50, "p95": p95, "p99": p99, "mean": float(np.mean(values)), "least": min(values)}


def copy_bandwidth(size: int = 256 << 20) -> float:
    """GB/s of a large copy, read and write counted: the limit for a stage that reads its weights once.

    Args:
        size: Bytes to copy.
    """
    source, target = np.ones(size // 8), np.empty(size // 8)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * size / (time.perf_counter() - started) / 1e9)
    return best


def cold_start(bundle: str, device: str) -> float:
    """Seconds from the start of a fresh Python until all stages are open. Raises PPLLaVAError on failure."""
    started = time.perf_counter()
    command = [sys.executable, "-c", OPEN_AND_LOAD, bundle, device]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        reason = last_line(run.stderr) or "no reason given"
        raise PPLLaVAError(f"a fresh process could not open {bundle}: {reason}")
    return time.perf_counter() - started
