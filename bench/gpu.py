"""Checks and benchmarks for a machine with a GPU.

    python bench/gpu.py kernel          # the CUDA kernels: correctness, and speed against a copy and torch
    python bench/gpu.py answer FOLDER   # Vicuna-7B's shape, random weights: seconds per stage, fp16 and int4
    python bench/gpu.py compile         # registers and spills on every target: needs nvcc, but no GPU

Also as `python -m ppllava_edge.bench.gpu`. Runs from a checkout that isn't installed. `kernel` needs torch
and cuda-core; `answer` needs onnxruntime-gpu, and the packages of the extras cpu and export.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDERS = ("engines", "export", "calibration", "runtime", "bench", "nano")


def find_package() -> None:
    """Make ppllava_edge importable from a checkout: link its folders as they would be installed."""
    try:
        import ppllava_edge  # noqa: F401
    except ImportError:
        root, site = Path(__file__).resolve().parent.parent, Path(tempfile.mkdtemp())
        (site / "ppllava_edge").mkdir()
        for path in [*(root / "api").iterdir(), *(root / folder for folder in FOLDERS)]:
            (site / "ppllava_edge" / path.name).symlink_to(path)
        sys.path.insert(0, str(site))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("what", choices=["kernel", "answer", "compile"], help="what to run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    answer = parser.add_argument_group("answer")
    folder = Path("gpu-bench")
    answer.add_argument("folder", nargs="?", type=Path, default=folder, help="keeps checkpoint and bundles")
    answer.add_argument("--shape", default="vicuna-7b", help="size of the model")
    answer.add_argument("--frames", type=int, default=32, help="frames of the clip")
    answer.add_argument("--text-tokens", type=int, default=76, help="with 1024 visual ones: a prompt of 1100")
    answer.add_argument("--new-tokens", type=int, default=128, help="tokens to generate")
    answer.add_argument("--runs", type=int, default=3, help="measured runs")
    answer.add_argument("--no-torch", action="store_true", help="only the runtime")
    compiling = parser.add_argument_group("compile")
    compiling.add_argument(
        "--targets", help="compute capabilities without the dot: 75,87,120  [default: all]"
    )
    return parser.parse_args()


def main() -> None:
    """Run what the command line asks for, print it, and write all figures with --json FILE."""
    options = parse_arguments()
    find_package()
    from ppllava_edge.engines.errors import PPLLaVAError

    try:
        report, show = run(options)
    except PPLLaVAError as error:
        sys.exit(f"error: {error}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    show(report)


def run(options: argparse.Namespace) -> tuple[Any, Callable[[Any], None]]:
    """Run the chosen report. Returns its figures and the function that prints them."""
    # Imports are here because the package can be found only now, and each part needs packages of its own.
    if options.what == "compile":
        from ppllava_edge.bench.gpu_report.compile import TARGETS, compile_table, show_compile_table

        targets = options.targets.split(",") if options.targets else TARGETS
        return compile_table(targets), show_compile_table
    if options.what == "kernel":
        from ppllava_edge.bench.gpu_report.kernel import kernel_report, show_kernel

        return kernel_report(), show_kernel
    from ppllava_edge.bench.gpu_report.answer import answer_report, show_answer

    report = answer_report(
        options.folder,
        options.shape,
        options.frames,
        options.text_tokens,
        options.new_tokens,
        options.runs,
        not options.no_torch,
    )
    return report, show_answer


if __name__ == "__main__":
    main()
