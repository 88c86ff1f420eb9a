"""What a GPU makes of it, in two runs: the pooling kernel's roofline, and a whole answer beside torch.

    python bench/gpu.py kernel             # correct on hundreds of random shapes, then bytes/s against the copy bandwidth, and torch
    python bench/gpu.py answer FOLDER      # Vicuna-7B's shape, random weights: seconds per stage and tokens/s at fp16 and int4
    python bench/gpu.py compile            # needs no GPU: registers and spills on every target (nvcc)

Also as `python -m ppllava_edge.bench.gpu`. From a checkout that isn't installed the folders are found by themselves. `kernel` needs torch and
cuda-core; `answer` needs onnxruntime-gpu, and the packages of the extras cpu and export.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDERS = ("engines", "export", "calibration", "runtime", "bench", "nano")
TARGETS = ("75", "80", "86", "87", "89", "90", "100", "110", "120")
REAL = (32, 24, 24, 4096)  # frames, rows, columns, channels of linear_1's output
WINDOW = (2, 3, 3)
CASES = 300


def find_package() -> None:
    """Make ppllava_edge importable from a checkout: its folders, linked as they would be installed."""
    try:
        import ppllava_edge  # noqa: F401
    except ImportError:
        root, place = Path(__file__).resolve().parent.parent, Path(tempfile.mkdtemp())
        (place / "ppllava_edge").mkdir()
        for path in [*(root / "api").iterdir(), *(root / folder for folder in FOLDERS)]:
            (place / "ppllava_edge" / path.name).symlink_to(path)
        sys.path.insert(0, str(place))


# -- compile -------------------------------------------------------------------------------------------------------------------------------


def compile_table(targets: Sequence[str] = TARGETS) -> list[dict[str, Any]]:
    """ptxas' report of every kernel on every target."""
    from ppllava_edge.engines.plugins.prepare_frame.kernel import FOLDER
    from ppllava_edge.engines.plugins.weighted_pool.kernel import SOURCE

    if not shutil.which("nvcc"):
        sys.exit("error: nvcc is not installed: it comes with the CUDA toolkit")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for target, source in (
            (target, source) for target in targets for source in (SOURCE, FOLDER / "prepare_frame.cu")
        ):
            command = [
                "nvcc",
                "-std=c++17",
                "-cubin",
                f"-arch=sm_{target}",
                "-Xptxas",
                "-v",
                str(source),
                "-o",
                f"{scratch}/k.cubin",
            ]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"error: nvcc for sm_{target}: {run.stderr.strip().splitlines()[-1]}")
            pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
            for name, stores, loads, registers in re.findall(pattern, run.stderr, re.S):
                rows.append(
                    {
                        "target": f"sm_{target}",
                        "kernel": name,
                        "registers": int(registers),
                        "spills": int(stores) + int(loads),
                    }
                )
    return rows


# -- kernel --------------------------------------------------------------------------------------------------------------------------------


def kernel_checks(torch: Any, launcher: Any, device: str = "cuda", stream: Any = None) -> dict[str, Any]:
    """Random shapes, types and windows against float64: the largest error as a share of what rounding allows."""
    import random

    rng, worst = random.Random(0), 0.0
    generator = torch.Generator(device).manual_seed(0)
    types = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    rounding = {"float32": 4e-6, "float16": 2**-11, "bfloat16": 2**-8}
    for case in range(CASES):
        size = tuple(rng.randint(1, 12) for _ in range(3))
        kernel, stride = tuple(rng.randint(1, n) for n in size), tuple(rng.randint(1, 4) for _ in size)
        channels, name, gelu = (
            rng.choice([1, 3, 8, 20, 64, 100, 1024, 1032]),
            rng.choice(list(types)),
            rng.random() < 0.5,
        )
        temperature = rng.choice([0.01, 0.1, 1.0])
        hidden = (torch.randn(*size, channels, device=device, generator=generator) * 3).to(types[name])
        weights = torch.rand(*size, device=device, generator=generator)
        counts = [(n - k) // s + 1 for n, k, s in zip(size, kernel, stride)]
        out = torch.full(
            (counts[0] * counts[1] * counts[2], channels), float("nan"), device=device, dtype=types[name]
        )
        launcher.pool(hidden, weights, out, kernel, stride, temperature, gelu, stream)
        rows = hidden.double()
        want = _windows(
            torch,
            torch.nn.functional.gelu(rows) if gelu else rows,
            weights.double(),
            kernel,
            stride,
            temperature,
        )
        allowed = rounding[name] * want.abs() * 1.1 + (1.8e-4 if gelu and name != "float32" else 3e-5)
        error = float(((out.double() - want).abs() / allowed).max())
        if not error < 1:  # NaN too: an element that was not written
            sys.exit(
                f"error: case {case}: {name} {size} x {channels}, kernel {kernel}, stride {stride}: {error:.2f} times what rounding allows"
            )
        worst = max(worst, error)
    return {"cases": CASES, "worst_share_of_allowed_error": worst}


def _windows(
    torch: Any,
    hidden: Any,
    weights: Any,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    temperature: float,
) -> Any:
    from ppllava_edge.bench.models.torch_eager import pool_windows

    return pool_windows(hidden, weights, kernel, stride, temperature)


def _stream(torch: Any, launcher: Any) -> Any:
    """torch's current stream, as the launcher takes it."""
    return launcher.core.Stream.from_handle(torch.cuda.current_stream().cuda_stream)


def seconds(torch: Any, work: Callable[[int], Any], runs: int = 50) -> float:
    """Median of runs, timed by events on the device; work gets the run's number, so that inputs can rotate."""
    for i in range(5):
        work(i)
    times = []
    for i in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth(torch: Any, size: int = 1 << 30) -> float:
    """bytes/s of a large copy on the device, read and write counted."""
    source, target = (
        torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda"),
        torch.empty(size, dtype=torch.uint8, device="cuda"),
    )
    return 2 * size / seconds(torch, lambda i: target.copy_(source))


def kernel_roofline(torch: Any, launcher: Any) -> list[dict[str, Any]]:
    """The real shape: bytes that must move over the time, against a copy; and the original algorithm in torch, eager and compiled."""
    from ppllava_edge.bench.models.torch_eager import pool_windows

    bandwidth, found, stream = copy_bandwidth(torch), [], _stream(torch, launcher)
    t, h, w, channels = REAL
    windows = (t // WINDOW[0]) * (h // WINDOW[1]) * (w // WINDOW[2])
    weights = torch.rand(t, h, w, device="cuda")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        hidden = [
            torch.randn(*REAL, device="cuda").to(dtype) for _ in range(4)
        ]  # together larger than any cache
        out = torch.empty(windows, channels, device="cuda", dtype=dtype)
        moved = hidden[0].nbytes + weights.nbytes + out.nbytes
        for gelu in (False, True):

            def ours(i: int, hidden: Any = hidden, out: Any = out, gelu: bool = gelu) -> None:
                launcher.pool(hidden[i % 4], weights, out, WINDOW, WINDOW, 0.01, gelu, stream)

            def original(i: int, hidden: Any = hidden, gelu: bool = gelu) -> Any:
                rows = hidden[i % 4]
                return pool_windows(
                    torch.nn.functional.gelu(rows) if gelu else rows, weights, WINDOW, WINDOW, 0.01
                )

            ours_s, again_s = seconds(torch, ours), seconds(torch, ours)
            eager_s = seconds(torch, original, runs=10)
            compiled = torch.compile(original)
            compiled_s = seconds(torch, compiled, runs=10)
            found.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "gelu": gelu,
                    "microseconds": ours_s * 1e6,
                    "again_microseconds": again_s * 1e6,
                    "gb_per_second": moved / ours_s / 1e9,
                    "share_of_copy": moved / ours_s / bandwidth,
                    "copy_gb_per_second": bandwidth / 1e9,
                    "torch_eager_ratio": eager_s / ours_s,
                    "torch_compile_ratio": compiled_s / ours_s,
                }
            )
    return found


def kernel_report() -> dict[str, Any]:
    """Checks, then the roofline."""
    import torch

    from ppllava_edge.engines.plugins.weighted_pool.kernel import Launcher

    launcher = Launcher()
    checks = kernel_checks(torch, launcher, stream=_stream(torch, launcher))
    frames = frame_checks(lambda image: torch.from_numpy(image).cuda())
    return {
        "gpu": torch.cuda.get_device_name(),
        "checks": checks,
        "frames": frames,
        "roofline": kernel_roofline(torch, launcher),
    }


def frame_checks(to_device: Callable[[Any], Any], gpu: Any = None, runs: int = 100) -> dict[str, Any]:
    """Frames in GPU memory, prepared there, against Pillow (rows first): how many differ at all, and microseconds for one of 1080p."""
    import numpy as np
    from PIL import Image

    from ppllava_edge.engines.backends.cuda_driver import CudaDevice
    from ppllava_edge.engines.bundle.manifest import Preprocessing
    from ppllava_edge.engines.plugins.prepare_frame.kernel import FramePreparer

    mean, std, side = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 336
    gpu, rng, wrong = gpu or CudaDevice(), np.random.default_rng(0), 0
    preparer, shapes = (
        FramePreparer(gpu, Preprocessing("squash", side, mean, std, ())),
        ((1080, 1920), (720, 1280), (336, 336), (480, 640), (100, 77)),
    )
    for height, width in shapes:
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        rows = Image.fromarray(image).resize((side, height), Image.Resampling.BICUBIC)
        scaled = np.asarray(rows.resize((side, side), Image.Resampling.BICUBIC)).astype(
            np.float32
        ) * np.float32(1 / 255)
        want = ((scaled - np.array(mean, np.float32)) / np.array(std, np.float32)).transpose(2, 0, 1)[None]
        pixels, _ = preparer.prepare(to_device(image))
        wrong += not np.array_equal(np.asarray(pixels), want)
    frame = to_device(rng.integers(0, 256, (1080, 1920, 3), np.uint8))
    preparer.prepare(frame)
    gpu.synchronize()
    started = time.perf_counter()
    for _ in range(runs):
        preparer.prepare(frame)
    gpu.synchronize()
    return {
        "shapes": len(shapes),
        "shapes_that_differ": wrong,
        "microseconds_1080p": (time.perf_counter() - started) / runs * 1e6,
    }


# -- answer --------------------------------------------------------------------------------------------------------------------------------


def answer_report(
    folder: Path,
    shape: str,
    frames: int,
    text_tokens: int,
    new_tokens: int,
    runs: int,
    with_torch: bool = True,
) -> dict[str, Any]:
    """Export a random checkpoint at fp16 and int4, build engines/cuda, and time every stage; torch eager and compiled in the same run."""
    from ppllava_edge.bench.models.random_checkpoint import SHAPES, write_random_checkpoint

    checkpoint, found = folder / "checkpoint", dict[str, Any]()
    if not (checkpoint / "config.json").exists():
        write_random_checkpoint(checkpoint, SHAPES[shape])
    for precision in ("fp16", "int4"):
        bundle = folder / precision
        if not (bundle / "engines" / "cuda").exists():
            extra = ["--weight-only"] if precision == "int4" else []
            _call(
                "export.cli",
                [str(checkpoint), "-o", str(bundle), "--precision", precision, "--no-engine", *extra],
            )
            _call("engines.build", [str(bundle), "--target", "cuda"])
        found[precision] = _bench(bundle, frames, text_tokens, new_tokens, runs)
    if with_torch:
        found["torch"] = torch_answer(checkpoint, frames, text_tokens, new_tokens)
    return found


def _call(module: str, arguments: list[str]) -> None:
    """Run a command of ours in a process of its own."""
    code = "import sys, runpy; sys.path[:0] = sys.argv[1].split(':'); sys.argv[1:] = sys.argv[3:]; "
    code += f"runpy.run_module('ppllava_edge.{module}', run_name='__main__', alter_sys=True)"
    run = subprocess.run([sys.executable, "-c", code, ":".join(sys.path), module, *arguments], text=True)
    if run.returncode:
        sys.exit(run.returncode)


def _bench(bundle: Path, frames: int, text_tokens: int, new_tokens: int, runs: int) -> dict[str, Any]:
    from ppllava_edge.bench.cli import measure

    return measure(str(bundle), runs, 1, frames, text_tokens, new_tokens, "cuda", None, "onnxruntime")


def torch_answer(
    checkpoint: Path, frames: int, text_tokens: int, new_tokens: int, device: str = "cuda"
) -> dict[str, Any]:
    """The original algorithm in float16 on the GPU: eager, and with the decoder's step compiled."""
    import torch

    from ppllava_edge.bench.models.torch_eager import TorchModel, answer

    model = TorchModel(checkpoint, dtype=torch.float16, device=device)
    size = model.config["vision_config"]["image_size"]
    pixels = torch.randn(frames, 3, size, size, device=device, dtype=torch.float16)
    text, question = torch.arange(1, text_tokens + 1, device=device), torch.arange(1, 17, device=device)[None]
    found: dict[str, Any] = {}
    for name in ("eager", "compiled"):
        if name == "compiled":
            torch._dynamo.config.recompile_limit = 256  # a weight's name is an argument in this model
            model.decode = torch.compile(model.decode, dynamic=True)  # type: ignore[method-assign]
        answer(model, pixels, question, text[:1], text[1:], new_tokens)
        started = time.perf_counter()
        _, timings = answer(model, pixels, question, text[:1], text[1:], new_tokens)
        found[name] = {
            "timings": timings,
            "seconds": time.perf_counter() - started,
            "tokens_per_second": (new_tokens - 1) / timings["generate"],
        }
    return found | ({"copy_gb_per_second": copy_bandwidth(torch) / 1e9} if device == "cuda" else {})


# -- command line --------------------------------------------------------------------------------------------------------------------------


def show(found: Any) -> None:
    """Print what people look at: tables; the rest as JSON."""
    from ppllava_edge.engines.terminal import table

    if isinstance(found, list):
        chosen = sorted({row["kernel"] for row in found})
        registers = {
            (row["target"], row["kernel"]): f"{row['registers']}{'' if not row['spills'] else ' spills'}"
            for row in found
        }
        targets = list(dict.fromkeys(row["target"] for row in found))
        rows = [(k.removeprefix("weighted_pool_"), *(registers[t, k] for t in targets)) for k in chosen]
        table("registers a thread (no spills unless said)", ("weighted_pool_", *targets), rows)
    elif "roofline" in found:
        columns = ("dtype", "gelu", "us", "GB/s", "of copy", "x torch eager", "x torch.compile")
        rows = [
            (
                r["dtype"],
                r["gelu"],
                f"{r['microseconds']:.1f}",
                f"{r['gb_per_second']:.0f}",
                f"{100 * r['share_of_copy']:.0f} %",
                f"{r['torch_eager_ratio']:.1f}",
                f"{r['torch_compile_ratio']:.1f}",
            )
            for r in found["roofline"]
        ]
        f = found["frames"]
        print(
            f"frames: {f['shapes'] - f['shapes_that_differ']} of {f['shapes']} shapes bit for bit, {f['microseconds_1080p']:.0f} us for one of 1080p"
        )
        table(
            f"{found['gpu']}, {found['checks']['cases']} random cases right, {REAL}, windows {WINDOW}",
            columns,
            rows,
        )
    else:
        show_answer(found, table)


def show_answer(found: dict[str, Any], table: Callable[..., None]) -> None:
    """Stages in milliseconds side by side; then tokens per second, and the share of the copy bandwidth that decoding reads its weights with."""
    names, torch = ("fp16", "int4"), found.get("torch", {})
    copy = torch.get("copy_gb_per_second")
    theirs = {kind: torch[kind]["timings"] for kind in ("eager", "compiled") if kind in torch}
    same = {"prefill": "prefill", "question": "question"}  # stages that both have under one name
    rows = []
    for stage in found["fp16"]["stages"]:
        ours = [f"{1000 * found[name]['stages'][stage]['p50']:.1f}" for name in names]
        rows.append(
            (
                stage,
                *ours,
                *(f"{1000 * t[same[stage]]:.1f}" if stage in same else "" for t in theirs.values()),
            )
        )
    first = [
        f"{1000 * sum(t[s] for s in ('vision', 'question', 'pooling', 'prefill')):.1f}"
        for t in theirs.values()
    ]
    rows.append(("first token, torch", "", "", *first))
    rows.append(
        (
            "tokens/s",
            *(f"{found[n]['tokens_per_second']:.1f}" for n in names),
            *(f"{torch[k]['tokens_per_second']:.1f}" for k in theirs),
        )
    )
    rates = [found[name]["decode_gb_per_second"] for name in names]
    rows.append(
        (
            "weights read, GB/s",
            *(f"{r:.0f}{f' = {100 * r / copy:.0f} % of a copy' if copy else ''}" for r in rates),
            *("" for _ in theirs),
        )
    )
    table("milliseconds unless said", ("stage", *names, *(f"torch {kind} fp16" for kind in theirs)), rows)


def main() -> None:
    """kernel, answer FOLDER, or compile; --json FILE writes all figures."""
    import argparse

    find_package()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["kernel", "answer", "compile"])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("gpu-bench"))
    parser.add_argument("--shape", default="vicuna-7b")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--text-tokens", type=int, default=76, help="with 1024 visual ones: a prompt of 1100")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument(
        "--targets", default=",".join(TARGETS), help="of compile: compute capabilities without the dot"
    )
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.what == "answer":
        found: Any = answer_report(
            a.folder, a.shape, a.frames, a.text_tokens, a.new_tokens, a.runs, not a.no_torch
        )
    else:
        found = compile_table(a.targets.split(",")) if a.what == "compile" else kernel_report()
    if a.json:
        a.json.write_text(json.dumps(found, indent=1))
    show(found)


if __name__ == "__main__":
    main()
