"""The same shapes, threads and weights through other engines, in turns: where we stand.

    python -m ppllava_edge.bench.peers FOLDER --openvino-python ov/bin/python --llama-python lc/bin/python

FOLDER holds the random checkpoint of bench.full_shape (made if it isn't there) and keeps what is converted from it. Every measurement is a
process of its own; rounds go through all of them in turn, and the best of each counts. Peers that aren't named are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ppllava_edge.bench.full_shape import write_test_video
from ppllava_edge.bench.models.random_checkpoint import SHAPES, write_random_checkpoint
from ppllava_edge.bench.peers.plain_vision import write_plain_vision
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.machine.memory import peak_memory
from ppllava_edge.engines.terminal import Command, human_bytes, table

PROMPT, NEW, FRAMES = 1100, 24, 4


def best(run: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def job_vision(bundle: str) -> dict[str, Any]:
    """Our trunk."""
    from ppllava_edge.runtime import Pipeline

    p = Pipeline.open(bundle, "cpu", threads=2)
    v = p.manifest.vision
    pixels = (
        np.random.default_rng(0).standard_normal((FRAMES, 3, v.image_size, v.image_size)).astype(np.float32)
    )
    return {"ms_per_frame": 1000 * best(lambda: p.encode_trunk(pixels)) / FRAMES}


def job_torch_vision(checkpoint: str, dtype: str) -> dict[str, Any]:
    """The same layers in torch eager."""
    import torch

    from ppllava_edge.bench.models.torch_eager import TorchModel

    torch.set_num_threads(2)
    model = TorchModel(Path(checkpoint), prefix="vision_tower.")
    model.w = {name: w.to(getattr(torch, dtype)) for name, w in model.w.items()}
    side = model.config["vision_config"]["image_size"]
    pixels = torch.randn(2, 3, side, side, dtype=getattr(torch, dtype))
    with torch.no_grad():
        return {
            "ms_per_frame": 1000 * best(lambda: model.trunk(pixels), 2) / len(pixels),
            "version": torch.__version__,
        }


def job_pooling(bundle: str) -> dict[str, Any]:
    """Our projector and pooling over 32 frames of features (weights given: the similarity is measured elsewhere)."""
    from ppllava_edge.runtime import Pipeline

    p = Pipeline.open(bundle, "cpu", threads=2)
    features, weights = _features(p.manifest.vision.patches, p.manifest.vision.hidden_size)
    p.stage("pooling")
    before = peak_memory()
    seconds = best(lambda: p.visual_tokens(features, None, weights=weights))
    return {"seconds": seconds, "extra_bytes": peak_memory() - before}


def job_torch_pooling(checkpoint: str) -> dict[str, Any]:
    """The original order in torch eager: linear_1, GELU, linear_2 on every patch, then windows unfolded, weighted and summed."""
    import torch

    from ppllava_edge.bench.models.torch_eager import TorchModel, pool_windows

    torch.set_num_threads(2)
    model = TorchModel(Path(checkpoint), prefix="multi_modal_projector.linear")
    config = model.config
    patches = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    features, weights = (
        torch.from_numpy(a) for a in _features(patches, config["vision_config"]["hidden_size"])
    )

    def run() -> Any:
        hidden = model.linear(
            torch.nn.functional.gelu(model.linear(features, "multi_modal_projector.linear_1")),
            "multi_modal_projector.linear_2",
        )
        return pool_windows(
            hidden.unflatten(1, weights.shape[1:]),
            weights,
            config["pooling_kernel"],
            config["pooling_stride"],
            config["pooling_temp"],
        )

    with torch.no_grad():
        before = peak_memory()
        seconds = best(run)
    return {"seconds": seconds, "extra_bytes": peak_memory() - before}


def _features(patches: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng, side = np.random.default_rng(0), round(patches**0.5)
    features = rng.standard_normal((32, patches, width)).astype(np.float32)
    logits = rng.standard_normal((32, side, side)).astype(np.float32)
    return features, np.exp(logits) / np.exp(logits).sum()


def job_decoder(bundle: str) -> dict[str, Any]:
    """Our decoder: tokens a second of prefill and decode."""
    from ppllava_edge.runtime import Pipeline

    p = Pipeline.open(bundle, "cpu", threads=2)
    rng, width = np.random.default_rng(0), p.manifest.decoder.hidden_size
    prompt = (0.02 * rng.standard_normal((PROMPT, width))).astype(np.float32)
    prefill, decode = [], []
    for _ in range(2):
        sequence = p.decoder.start(PROMPT, NEW)
        prefill.append(best(lambda s=sequence: s.run(prompt), 1))  # type: ignore[misc]
        sequence.run(prompt[:1])
        decode.append(best(lambda s=sequence: [s.run(prompt[:1]) for _ in range(NEW - 1)], 1) / (NEW - 1))  # type: ignore[misc]
        p.decoder.finish(sequence)
    return {"prefill": PROMPT / min(prefill), "decode": 1 / min(decode)}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "vision": job_vision,
    "torch-vision": job_torch_vision,
    "pooling": job_pooling,
    "torch-pooling": job_torch_pooling,
    "decoder": job_decoder,
}


def child(command: list[str]) -> dict[str, Any]:
    """Run a measurement in a process of its own. Raises PPLLaVAError with its last line if it fails."""
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise PPLLaVAError(
            f"{' '.join(command[:3])} failed: {(run.stderr.strip().splitlines() or ['no reason given'])[-1]}"
        )
    return json.loads(run.stdout.strip().splitlines()[-1])


def prepare(folder: Path, llama_python: str | None) -> tuple[Path, dict[str, Path]]:
    """The checkpoint, its bundles at fp32, int8 and int4 (blocks of 32 and of 128), a calibration clip, graphs for OpenVINO and a file for llama.cpp."""
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").exists():
        write_random_checkpoint(checkpoint, SHAPES["vit-l-336"])
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    if not (clip := folder / "clips" / "noise.mp4").exists():
        write_test_video(clip)
    found = {}
    for name, precision, extra in (
        ("fp32", "fp32", ["--engine"]),
        ("int8", "int8", ["--calibrate", str(clip.parent), "--calibration-frames", "2", "--allow-drift"]),
        ("int4", "int4", []),
        ("int4-128", "int4", ["--block", "128"]),
    ):
        found[name] = folder / f"peer-{name}"
        if not found[name].exists():
            command = [
                sys.executable,
                "-m",
                "ppllava_edge.export.cli",
                str(checkpoint),
                "-o",
                str(found[name]),
                "--precision",
                precision,
                *extra,
            ]
            subprocess.run(command, check=True)
    for precision in ("fp32", "int8"):
        found[f"plain-{precision}"] = folder / f"plain-{precision}.onnx"
        if not found[f"plain-{precision}"].exists():
            write_plain_vision(found[precision] / "trunk.onnx", found[f"plain-{precision}"])
    if llama_python:
        found["gguf"] = folder / "decoder.gguf"
        if not found["gguf"].exists():
            subprocess.run(
                [
                    llama_python,
                    str(Path(__file__).with_name("peer_llama_cpp.py")),
                    "convert",
                    str(checkpoint),
                    str(found["gguf"]),
                ],
                check=True,
            )
    return checkpoint, found


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--openvino-python", help="A Python that has openvino.")
@click.option("--llama-python", help="A Python that has gguf and llama-cpp-python.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--only", help="Jobs whose names contain this.")
@click.option("--json", "as_json", is_flag=True)
def main(
    folder: Path,
    openvino_python: str | None,
    llama_python: str | None,
    rounds: int,
    only: str | None,
    as_json: bool,
) -> None:
    """Measure us and our peers in turns."""
    checkpoint, made = prepare(folder, llama_python)
    me, here = [sys.executable, "-m", "ppllava_edge.bench.peers"], Path(__file__).parent
    jobs: dict[str, list[str]] = {
        "vision, ours fp32": [*me, "vision", str(made["fp32"])],
        "vision, ours int8": [*me, "vision", str(made["int8"])],
        "vision, torch eager fp32": [*me, "torch-vision", str(checkpoint), "float32"],
        "vision, torch eager bf16": [*me, "torch-vision", str(checkpoint), "bfloat16"],
        "pooling, ours fp32": [*me, "pooling", str(made["fp32"])],
        "pooling, ours int8": [*me, "pooling", str(made["int8"])],
        "pooling, torch eager fp32": [*me, "torch-pooling", str(checkpoint)],
        "decoder, ours int4": [*me, "decoder", str(made["int4"])],
        "decoder, ours int4, blocks of 128": [*me, "decoder", str(made["int4-128"])],
        "decoder, ours int8": [*me, "decoder", str(made["int8"])],
    }
    if openvino_python:
        for name, graph, precision in (
            ("fp32", "fp32", "f32"),
            ("bf16", "fp32", "bf16"),
            ("int8", "int8", "f32"),
        ):
            jobs[f"vision, OpenVINO {name}"] = [
                openvino_python,
                str(here / "peer_openvino.py"),
                str(made[f"plain-{graph}"]),
                str(FRAMES),
                precision,
            ]
    if llama_python:
        jobs["decoder, llama.cpp Q4_0"] = [
            llama_python,
            str(here / "peer_llama_cpp.py"),
            "run",
            str(made["gguf"]),
            str(PROMPT),
            str(NEW),
        ]
    jobs = {name: command for name, command in jobs.items() if not only or only in name}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name, command in jobs.items():
            results[name].append(child(command))
            click.echo(f"round {number + 1}: {name}: {results[name][-1]}", err=True)
    summary = {
        name: {
            key: (max if key in ("prefill", "decode") else min)(r[key] for r in runs)
            for key in runs[0]
            if isinstance(runs[0][key], (int, float))
        }
        for name, runs in results.items()
    }
    if as_json:
        click.echo(json.dumps({"rounds": results, "best": summary}))
        return
    rows = [
        (
            name,
            ", ".join(
                f"{key} {human_bytes(v) if 'bytes' in key else f'{v:.4g}'}" for key, v in found.items()
            ),
        )
        for name, found in summary.items()
    ]
    table(f"{rounds} rounds in turn, 2 threads, best of each", ("job", "measured"), rows)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in JOBS:
        print(json.dumps(JOBS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
