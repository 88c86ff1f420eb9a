"""The CUDA kernels: correctness on random input, and speed against a copy and torch."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppllava_edge.bench.gpu_report.timing import copy_bandwidth, median_seconds
from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.bundle.manifest import Preprocessing
from ppllava_edge.engines.plugins.prepare_frame.kernel import FramePreparer
from ppllava_edge.engines.plugins.weighted_pool.kernel import Launcher
from ppllava_edge.engines.terminal import table

REAL = (32, 24, 24, 4096)  # frames, rows, columns, channels of linear_1's output
WINDOW = (2, 3, 3)
CASES = 300
CHANNELS = (1, 3, 8, 20, 64, 100, 1024, 1032)
ROUNDING = {"float32": 4e-6, "float16": 2**-11, "bfloat16": 2**-8}  # relative error that a type may add
FRAME_SHAPES = ((1080, 1920), (720, 1280), (336, 336), (480, 640), (100, 77))
SIDE = 336
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def kernel_report() -> dict[str, Any]:
    """Check both kernels on this GPU, then measure the roofline.

    Returns:
        "gpu" (its name), "checks" of kernel_checks, "frames" of frame_checks, "roofline" of kernel_roofline.
    """
    import torch

    launcher = Launcher()
    checks = kernel_checks(torch, launcher, stream=_stream(torch, launcher))
    frames = frame_checks(lambda image: torch.from_numpy(image).cuda())
    return {
        "gpu": torch.cuda.get_device_name(),
        "checks": checks,
        "frames": frames,
        "roofline": kernel_roofline(torch, launcher),
    }


def _stream(torch: Any, launcher: Any) -> Any:
    """torch's current stream, as the launcher takes it."""
    return launcher.core.Stream.from_handle(torch.cuda.current_stream().cuda_stream)


# -- the pooling kernel: checks ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """A random pooling. size, kernel, stride: (frames, rows, columns). dtype: of the hidden states."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    channels: int
    dtype: str
    gelu: bool
    temperature: float

    @classmethod
    def sample(cls, rng: random.Random) -> _Case:
        """A random case."""
        size = tuple(rng.randint(1, 12) for _ in range(3))
        return cls(
            size=size,
            kernel=tuple(rng.randint(1, n) for n in size),
            stride=tuple(rng.randint(1, 4) for _ in size),
            channels=rng.choice(CHANNELS),
            dtype=rng.choice(list(ROUNDING)),
            gelu=rng.random() < 0.5,
            temperature=rng.choice([0.01, 0.1, 1.0]),
        )

    @property
    def windows(self) -> int:
        """How many windows fit."""
        along = [(n - k) // s + 1 for n, k, s in zip(self.size, self.kernel, self.stride)]
        return along[0] * along[1] * along[2]

    def __str__(self) -> str:
        shape = f"{self.dtype} {self.size} x {self.channels}"
        return f"{shape}, kernel {self.kernel}, stride {self.stride}"


def kernel_checks(torch: Any, launcher: Any, device: str = "cuda", stream: Any = None) -> dict[str, Any]:
    """Compare the pooling kernel with float64 torch on random shapes, types and windows.

    Exits with one line if a case differs by more than rounding allows.

    Args:
        torch: The module.
        launcher: The kernel's Launcher.
        device: Device on which torch creates its tensors.
        stream: Stream on which the launcher runs.

    Returns:
        "cases" (count), "worst_share_of_allowed_error" (below 1).
    """
    rng = random.Random(0)
    generator = torch.Generator(device).manual_seed(0)
    worst = 0.0
    for number in range(CASES):
        case = _Case.sample(rng)
        error = _share_of_allowed_error(torch, launcher, case, generator, stream)
        if not error < 1:  # catches NaN too: an element that was not written
            sys.exit(f"error: case {number}: {case}: {error:.2f} times what rounding allows")
        worst = max(worst, error)
    return {"cases": CASES, "worst_share_of_allowed_error": worst}


def _share_of_allowed_error(torch: Any, launcher: Any, case: _Case, generator: Any, stream: Any) -> float:
    """The largest error of one case over the error that rounding allows there."""
    from ppllava_edge.bench.models.torch_eager import pool_windows

    device, dtype = generator.device, getattr(torch, case.dtype)
    windows = case.kernel, case.stride, case.temperature
    hidden = (torch.randn(*case.size, case.channels, device=device, generator=generator) * 3).to(dtype)
    weights = torch.rand(*case.size, device=device, generator=generator)
    out = torch.full((case.windows, case.channels), float("nan"), device=device, dtype=dtype)
    launcher.pool(hidden, weights, out, *windows, case.gelu, stream)
    rows = hidden.double()
    if case.gelu:
        rows = torch.nn.functional.gelu(rows)
    expected = pool_windows(rows, weights.double(), *windows)
    # GELU of 16-bit types is approximated (weighted_pool.cuh).
    absolute = 1.8e-4 if case.gelu and case.dtype != "float32" else 3e-5
    allowed = ROUNDING[case.dtype] * expected.abs() * 1.1 + absolute
    return float(((out.double() - expected).abs() / allowed).max())


# -- the pooling kernel: roofline ----------------------------------------------------------------------------


def kernel_roofline(torch: Any, launcher: Any) -> list[dict[str, Any]]:
    """Time the pooling of the real shape, per type, with and without GELU.

    Returns:
        Per variant: microseconds (twice), bytes that must move per second, their share of a copy's bandwidth,
        and how many times longer the original algorithm takes in torch, eager and compiled.
    """
    bandwidth, stream = copy_bandwidth(torch), _stream(torch, launcher)
    frames, rows, columns, channels = REAL
    windows = (frames // WINDOW[0]) * (rows // WINDOW[1]) * (columns // WINDOW[2])
    weights = torch.rand(frames, rows, columns, device="cuda")
    report = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        hidden = [torch.randn(*REAL, device="cuda").to(dtype) for _ in range(4)]  # more than any cache holds
        out = torch.empty(windows, channels, device="cuda", dtype=dtype)
        moved = hidden[0].nbytes + weights.nbytes + out.nbytes
        for gelu in (False, True):
            seconds = _pooling_seconds(torch, launcher, stream, hidden, weights, out, gelu)
            report.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "gelu": gelu,
                    "microseconds": seconds["ours"] * 1e6,
                    "again_microseconds": seconds["again"] * 1e6,
                    "gb_per_second": moved / seconds["ours"] / 1e9,
                    "share_of_copy": moved / seconds["ours"] / bandwidth,
                    "copy_gb_per_second": bandwidth / 1e9,
                    "torch_eager_ratio": seconds["eager"] / seconds["ours"],
                    "torch_compile_ratio": seconds["compiled"] / seconds["ours"],
                }
            )
    return report


def _pooling_seconds(
    torch: Any, launcher: Any, stream: Any, hidden: list[Any], weights: Any, out: Any, gelu: bool
) -> dict[str, float]:
    """Median seconds of the kernel, twice ("ours", "again"), and of torch ("eager", "compiled")."""
    from ppllava_edge.bench.models.torch_eager import pool_windows

    def ours(i: int) -> None:
        launcher.pool(hidden[i % 4], weights, out, WINDOW, WINDOW, 0.01, gelu, stream)

    def original(i: int) -> Any:
        rows = hidden[i % 4]
        if gelu:
            rows = torch.nn.functional.gelu(rows)
        return pool_windows(rows, weights, WINDOW, WINDOW, 0.01)

    return {
        "ours": median_seconds(torch, ours),
        "again": median_seconds(torch, ours),
        "eager": median_seconds(torch, original, runs=10),
        "compiled": median_seconds(torch, torch.compile(original), runs=10),
    }


# -- the frame kernels ---------------------------------------------------------------------------------------


def frame_checks(to_device: Callable[[Any], Any], gpu: Any = None, runs: int = 100) -> dict[str, Any]:
    """Compare frames that are prepared on the GPU with Pillow (resizing rows first), and time one.

    Args:
        to_device: Moves an RGB uint8 frame (H, W, 3) to the GPU.
        gpu: The device; None: this machine's.
        runs: Timed runs.

    Returns:
        "shapes" (count), "shapes_that_differ", "microseconds_1080p" (for one frame of 1080p).
    """
    gpu = gpu or CudaDevice()
    rng = np.random.default_rng(0)
    preparer = FramePreparer(gpu, Preprocessing("squash", SIDE, MEAN, STD, ()))
    wrong = 0
    for height, width in FRAME_SHAPES:
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        pixels, _ = preparer.prepare(to_device(image))
        wrong += not np.array_equal(np.asarray(pixels), _prepared_by_pillow(image))
    frame = to_device(rng.integers(0, 256, (1080, 1920, 3), np.uint8))
    preparer.prepare(frame)
    gpu.synchronize()
    started = time.perf_counter()
    for _ in range(runs):
        preparer.prepare(frame)
    gpu.synchronize()
    seconds = (time.perf_counter() - started) / runs
    return {
        "shapes": len(FRAME_SHAPES),
        "shapes_that_differ": wrong,
        "microseconds_1080p": seconds * 1e6,
    }


def _prepared_by_pillow(image: np.ndarray) -> np.ndarray:
    """Pixels (1, 3, SIDE, SIDE) float32 of a frame (H, W, 3)."""
    from PIL import Image

    resample = Image.Resampling.BICUBIC
    rows = Image.fromarray(image).resize((SIDE, image.shape[0]), resample)
    scaled = np.asarray(rows.resize((SIDE, SIDE), resample)).astype(np.float32) * np.float32(1 / 255)
    normalised = (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return normalised.transpose(2, 0, 1)[None]


# -- output --------------------------------------------------------------------------------------------------


def show_kernel(report: dict[str, Any]) -> None:
    """Print the roofline as a table."""
    frames = report["frames"]
    right = frames["shapes"] - frames["shapes_that_differ"]
    microseconds = f"{frames['microseconds_1080p']:.0f} us for one of 1080p"
    print(f"frames: {right} of {frames['shapes']} shapes bit for bit, {microseconds}")
    columns = ("dtype", "gelu", "us", "GB/s", "of copy", "x torch eager", "x torch.compile")
    rows = [
        (
            row["dtype"],
            row["gelu"],
            f"{row['microseconds']:.1f}",
            f"{row['gb_per_second']:.0f}",
            f"{100 * row['share_of_copy']:.0f} %",
            f"{row['torch_eager_ratio']:.1f}",
            f"{row['torch_compile_ratio']:.1f}",
        )
        for row in report["roofline"]
    ]
    checks = f"{report['checks']['cases']} random cases right"
    table(f"{report['gpu']}, {checks}, {REAL}, windows {WINDOW}", columns, rows)
