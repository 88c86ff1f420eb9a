"""The same shapes, threads and weights through other engines, in turns.

    python -m ppllava_edge.bench.peers FOLDER --openvino-python ov/bin/python --llama-python lc/bin/python

FOLDER holds the random checkpoint of bench.full_shape (created if missing) and the files converted from it.
Every measurement runs in a process of its own; rounds go through all of them in turn, and the best of each
counts. Peers without a Python are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ppllava_edge.bench.measuring.child_process import run_json
from ppllava_edge.bench.peers.jobs import FRAMES, JOBS, NEW, PROMPT
from ppllava_edge.bench.peers.prepare import (
    LLAMA_CPP,
    LLAMA_CPP_PACKAGES,
    OPENVINO,
    OPENVINO_PACKAGES,
    check_packages,
    prepare,
)
from ppllava_edge.engines.terminal import Command, human_bytes, table

HIGHER_IS_BETTER = ("prefill", "decode")  # tokens per second; the other figures are times and bytes


def commands(
    checkpoint: Path, paths: dict[str, Path], openvino_python: str | None, llama_python: str | None
) -> dict[str, list[str]]:
    """Every measurement's name and command. Arguments as `prepare` returns and the options give them."""
    here = [sys.executable, "-m", "ppllava_edge.bench.peers"]
    jobs = {
        "vision, ours fp32": [*here, "vision", paths["fp32"]],
        "vision, ours int8": [*here, "vision", paths["int8"]],
        "vision, torch eager fp32": [*here, "torch-vision", checkpoint, "float32"],
        "vision, torch eager bf16": [*here, "torch-vision", checkpoint, "bfloat16"],
        "pooling, ours fp32": [*here, "pooling", paths["fp32"]],
        "pooling, ours int8": [*here, "pooling", paths["int8"]],
        "pooling, torch eager fp32": [*here, "torch-pooling", checkpoint],
        "decoder, ours int4": [*here, "decoder", paths["int4"]],
        "decoder, ours int4, blocks of 128": [*here, "decoder", paths["int4-128"]],
        "decoder, ours int8": [*here, "decoder", paths["int8"]],
    }
    if openvino_python:
        openvino = [openvino_python, OPENVINO]
        jobs["vision, OpenVINO fp32"] = [*openvino, paths["plain-fp32"], FRAMES, "f32"]
        jobs["vision, OpenVINO bf16"] = [*openvino, paths["plain-fp32"], FRAMES, "bf16"]
        jobs["vision, OpenVINO int8"] = [*openvino, paths["plain-int8"], FRAMES, "f32"]
    if llama_python:
        jobs["decoder, llama.cpp Q4_0"] = [llama_python, LLAMA_CPP, "run", paths["gguf"], PROMPT, NEW]
    return {name: [str(argument) for argument in command] for name, command in jobs.items()}


def run_rounds(jobs: dict[str, list[str]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run all measurements in turns. Returns the figures of every round by name."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name, command in jobs.items():
            figures = run_json(command)
            results[name].append(figures)
            click.echo(f"round {number + 1}: {name}: {figures}", err=True)
    return results


def best_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The best of every figure over all rounds."""
    names = [name for name, value in runs[0].items() if isinstance(value, (int, float))]
    return {
        name: (max if name in HIGHER_IS_BETTER else min)(figures[name] for figures in runs) for name in names
    }


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--openvino-python", help="A Python that has openvino.")
@click.option("--llama-python", help="A Python that has gguf, llama-cpp-python and safetensors.")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Rounds through all measurements; the best of each counts.",
)
@click.option("--only", metavar="TEXT", help="Only measurements whose names contain this.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(
    folder: Path,
    openvino_python: str | None,
    llama_python: str | None,
    rounds: int,
    only: str | None,
    as_json: bool,
) -> None:
    """Measure the runtime and its peers in turns, working in FOLDER."""
    if openvino_python:
        check_packages(openvino_python, OPENVINO_PACKAGES)
    if llama_python:
        check_packages(llama_python, LLAMA_CPP_PACKAGES)
    checkpoint, paths = prepare(folder, llama_python)
    jobs = commands(checkpoint, paths, openvino_python, llama_python)
    results = run_rounds(
        {name: command for name, command in jobs.items() if not only or only in name}, rounds
    )
    best = {name: best_of(runs) for name, runs in results.items()}
    if as_json:
        click.echo(json.dumps({"rounds": results, "best": best}))
        return
    rows = [
        (name, ", ".join(_words(*figure) for figure in figures.items())) for name, figures in best.items()
    ]
    table(f"{rounds} rounds in turn, 2 threads, best of each", ("job", "measured"), rows)


def _words(name: str, value: float) -> str:
    return f"{name} {human_bytes(value) if 'bytes' in name else f'{value:.4g}'}"


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in JOBS:
        print(json.dumps(JOBS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
