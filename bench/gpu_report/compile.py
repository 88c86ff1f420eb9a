"""Registers and spills of every kernel on every target, as ptxas reports them. Needs nvcc, no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppllava_edge.engines.plugins.prepare_frame.kernel import FOLDER
from ppllava_edge.engines.plugins.weighted_pool.kernel import SOURCE
from ppllava_edge.engines.terminal import table

TARGETS = ("75", "80", "86", "87", "89", "90", "100", "110", "120")
SOURCES = (SOURCE, FOLDER / "prepare_frame.cu")
REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.S,
)


def compile_table(targets: Sequence[str] = TARGETS) -> list[dict[str, Any]]:
    """Compile all kernels with nvcc; exits with one line if it is missing or fails.

    Args:
        targets: Compute capabilities without the dot.

    Returns:
        "target", "kernel", "registers" (per thread) and "spills" (bytes) of every kernel on every target.
    """
    if not shutil.which("nvcc"):
        sys.exit("error: nvcc is not installed: it comes with the CUDA toolkit")
    rows = []
    for target in targets:
        for source in SOURCES:
            for kernel, stores, loads, registers in REPORT.findall(_ptxas_report(target, source)):
                spills = int(stores) + int(loads)
                rows.append(
                    {
                        "target": f"sm_{target}",
                        "kernel": kernel,
                        "registers": int(registers),
                        "spills": spills,
                    }
                )
    return rows


def _ptxas_report(target: str, source: Path) -> str:
    options = ["-std=c++17", "-cubin", f"-arch=sm_{target}", "-Xptxas", "-v"]
    with tempfile.TemporaryDirectory() as scratch:
        command = ["nvcc", *options, str(source), "-o", f"{scratch}/kernel.cubin"]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"error: nvcc for sm_{target}: {run.stderr.strip().splitlines()[-1]}")
    return run.stderr


def show_compile_table(rows: list[dict[str, Any]]) -> None:
    """Print registers by kernel and target."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    kernels = sorted({row["kernel"] for row in rows})
    registers = {
        (row["target"], row["kernel"]): f"{row['registers']}{' spills' if row['spills'] else ''}"
        for row in rows
    }
    cells = [
        (kernel.removeprefix("weighted_pool_"), *(registers[target, kernel] for target in targets))
        for kernel in kernels
    ]
    table("registers per thread (no spills unless said)", ("weighted_pool_", *targets), cells)
