"""Measurements in this environment: the runtime, and the original algorithm in torch, 2 threads each."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.machine.memory import peak_memory
from ppllava_edge.runtime.decoding.sequence import Sequence
from ppllava_edge.runtime.pipeline.cpu import CpuPipeline
from ppllava_edge.runtime.pipeline.factory import Pipeline

PROMPT = 1100  # tokens
NEW = 24  # tokens
FRAMES = 4
THREADS = 2


def vision(bundle: str) -> dict[str, Any]:
    """Our vision tower: milliseconds per frame."""
    pipeline = Pipeline.open(bundle, "cpu", threads=THREADS)
    side = pipeline.manifest.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((FRAMES, 3, side, side)).astype(np.float32)
    return {"ms_per_frame": 1000 * best_time(lambda: pipeline.encode_trunk(pixels)) / FRAMES}


def torch_vision(checkpoint: str, dtype: str) -> dict[str, Any]:
    """The same layers in torch eager: milliseconds per frame. dtype: as torch calls it."""
    import torch

    from ppllava_edge.bench.models.torch_eager import TorchModel

    torch.set_num_threads(THREADS)
    model = TorchModel(Path(checkpoint), prefix="vision_tower.", dtype=getattr(torch, dtype))
    side = model.config["vision_config"]["image_size"]
    pixels = torch.randn(2, 3, side, side, dtype=getattr(torch, dtype))
    with torch.no_grad():
        seconds = best_time(lambda: model.trunk(pixels), 2)
    return {"ms_per_frame": 1000 * seconds / len(pixels), "version": torch.__version__}


def pooling(bundle: str) -> dict[str, Any]:
    """Our projector and pooling over 32 frames of features: seconds, and bytes of additional memory.

    The weights of the patches are given: the similarity is measured elsewhere.
    """
    pipeline = Pipeline.open(bundle, "cpu", threads=THREADS)
    assert isinstance(pipeline, CpuPipeline)
    features, weights = _features(pipeline.manifest.vision.patches, pipeline.manifest.vision.hidden_size)
    pipeline.stage("pooling")  # opened before memory is measured
    before = peak_memory()
    seconds = best_time(lambda: pipeline.visual_tokens(features, None, weights=weights))
    return {"seconds": seconds, "extra_bytes": peak_memory() - before}


def torch_pooling(checkpoint: str) -> dict[str, Any]:
    """The original order in torch eager: seconds, and bytes of additional memory.

    linear_1, GELU and linear_2 on every patch, then windows unfolded, weighted and summed.
    """
    import torch

    from ppllava_edge.bench.models.torch_eager import TorchModel, pool_windows

    torch.set_num_threads(THREADS)
    model = TorchModel(Path(checkpoint), prefix="multi_modal_projector.linear")
    config, tower = model.config, model.config["vision_config"]
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    features, weights = (torch.from_numpy(array) for array in _features(patches, tower["hidden_size"]))
    kernel, stride, temperature = (config[f"pooling_{name}"] for name in ("kernel", "stride", "temp"))

    def run() -> Any:
        hidden = torch.nn.functional.gelu(model.linear(features, "multi_modal_projector.linear_1"))
        hidden = model.linear(hidden, "multi_modal_projector.linear_2")
        return pool_windows(hidden.unflatten(1, weights.shape[1:]), weights, kernel, stride, temperature)

    with torch.no_grad():
        before = peak_memory()
        seconds = best_time(run)
    return {"seconds": seconds, "extra_bytes": peak_memory() - before}


def _features(patches: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Random features (32, patches, width) and weights (32, side, side), float32."""
    rng = np.random.default_rng(0)
    side = round(patches**0.5)
    features = rng.standard_normal((32, patches, width)).astype(np.float32)
    logits = rng.standard_normal((32, side, side)).astype(np.float32)
    return features, np.exp(logits) / np.exp(logits).sum()


def decoder(bundle: str) -> dict[str, Any]:
    """Our decoder: tokens per second of prefill and decode."""
    pipeline = Pipeline.open(bundle, "cpu", threads=THREADS)
    rng = np.random.default_rng(0)
    shape = (PROMPT, pipeline.manifest.decoder.hidden_size)
    prompt = (0.02 * rng.standard_normal(shape)).astype(np.float32)
    token = pipeline.manifest.decoder.vocab // 2
    prefill, decode = [], []
    for _ in range(2):
        sequence = pipeline.decoder.start(PROMPT, NEW)
        started = time.perf_counter()
        sequence.feed(prompt)
        sequence.logits()
        prefill.append(time.perf_counter() - started)
        _decode(sequence, token)  # the first step binds its buffers
        started = time.perf_counter()
        for _ in range(NEW - 1):
            _decode(sequence, token)
        decode.append((time.perf_counter() - started) / (NEW - 1))
        pipeline.decoder.finish(sequence)
    return {"prefill": PROMPT / min(prefill), "decode": 1 / min(decode)}


def _decode(sequence: Sequence, token: int) -> None:
    sequence.verify([token])
    sequence.logits()


def best_time(run: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "vision": vision,
    "torch-vision": torch_vision,
    "pooling": pooling,
    "torch-pooling": torch_pooling,
    "decoder": decoder,
}
