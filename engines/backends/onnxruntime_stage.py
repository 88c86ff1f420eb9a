"""Opening a bundle's graphs with ONNX Runtime, on the CPU or on CUDA."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.libraries import import_onnxruntime
from ppllava_edge.engines.machine.gpu_facts import load_driver

LARGE_DATA = 64 << 20  # bytes of a graph's weights from which their mapping is worth releasing
MADV_DONTNEED = 4
NUMPY_TYPE = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


def choose_device(device: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda". Raises EngineError if CUDA was asked for and isn't there."""
    if device not in ("auto", "cpu", "cuda"):
        raise EngineError(f"device {device!r} is unknown; choose auto, cpu or cuda")
    if device == "cpu":
        return "cpu"
    available = has_cuda_provider()
    if device == "auto":
        return "cuda" if available and load_driver() is not None else "cpu"
    if not available:
        raise EngineError(
            "--device cuda needs ONNX Runtime's CUDA build: pip uninstall onnxruntime, then pip install 'ppllava-edge[cuda]'"
        )
    if load_driver() is None:
        raise EngineError("--device cuda: no NVIDIA driver was found on this machine; use --device cpu")
    return "cuda"


def has_cuda_provider() -> bool:
    """Whether this ONNX Runtime was built with CUDA; says nothing about a GPU."""
    return "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()


class Stage:
    """One graph, opened. Floating inputs are cast to what the graph takes; floating outputs come back as they are."""

    def __init__(
        self,
        path: Path,
        device: str = "cpu",
        threads: int | None = None,
        lean: bool = False,
        piece: bool = False,
    ):
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.qdq_matmulnbits_accuracy_level", "4"
        )  # weight-only products multiply in INT8: 5 times faster
        if (
            piece
        ):  # of a stage: what one computed with, and its waiting threads, must not be in the way of the next
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if lean:  # half the memory, a little slower: for graphs that run a few times
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        if threads:
            options.intra_op_num_threads = threads
        providers: list[Any] = (
            ["CPUExecutionProvider"]
            if device == "cpu"
            else [("CUDAExecutionProvider", {}), "CPUExecutionProvider"]
        )
        try:
            self.session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            hint = (
                "; it needs ONNX Runtime 1.24 or newer, or: ppllava-build BUNDLE --target lowered"
                if "opset" in str(error).lower()
                else ""
            )
            raise EngineError(
                f"ONNX Runtime {ort.__version__} can't open {path.name}{hint or ': ' + first_line(error)}"
            ) from None
        if device == "cuda" and "CUDAExecutionProvider" not in self.session.get_providers():
            raise EngineError(
                "ONNX Runtime could not start its CUDA provider (driver, CUDA or cuDNN missing); use --device cpu"
            )
        release_mapped_weights(path)
        self.path, self.device = path, device
        self.dtypes = {i.name: NUMPY_TYPE[i.type] for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]

    def __call__(self, tidy: bool = False, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run once. tidy: give the memory that it computed with back to the system, for stages that won't run again soon.

        Raises EngineError if the engine refuses the inputs or runs out of memory.
        """
        options = None
        if tidy and self.device == "cpu":
            options = import_onnxruntime().RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        try:
            return self.session.run(
                None,
                {name: np.ascontiguousarray(a, dtype=self.dtypes[name]) for name, a in inputs.items()},
                options,
            )
        except Exception as error:
            raise EngineError(f"{self.path.name} failed: {first_line(error)}") from None


def release_mapped_weights(path: Path) -> None:
    """Tell the system that a graph's mapped weights may leave memory: the engine has packed copies. What is still read comes back by itself."""
    data = path.with_name(path.name + ".data")
    if not sys.platform.startswith("linux") or not data.is_file() or data.stat().st_size < LARGE_DATA:
        return
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        start = end = 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split(" ", 1)[0]:  # the head of a mapping; its figures follow
                start, end = (
                    (int(part, 16) for part in line.split()[0].split("-"))
                    if line.endswith(str(data.resolve()))
                    else (0, 0)
                )
            elif (
                end and line.startswith("Anonymous:") and line.split()[1] == "0"
            ):  # pages that were written to would be lost
                libc.madvise(start, end - start, MADV_DONTNEED)
    except (OSError, AttributeError, ValueError):
        return  # it only saves memory


def first_line(error: Exception) -> str:
    """What an engine said, cut to one line."""
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:300]
