"""The kernels' host build, and a test double of cuda-core that runs it on numpy arrays instead of a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from math import erf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppllava_edge.engines.plugins.weighted_pool.kernel import FOLDER, Call

BITS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@cache
def library(folder: Path, sources: Path = FOLDER) -> ctypes.CDLL:
    """Compile host.cpp. Skips the test where there is no C++ compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler on this machine: the kernel's host build can't be made")
    built = folder / f"{sources.name}.so"
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    command = [compiler, *options, str(sources / "host.cpp"), "-o", str(built)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(built))


def run_host(lib: ctypes.CDLL, call: Call, hidden: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Run one pooling with the GPU kernel's arguments. The output starts as NaN, so gaps show."""
    nan = 0x7FFF if call.dtype == "bfloat16" else np.nan
    out = np.full((call.windows, call.channels), nan, BITS[call.dtype])
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (hidden, weights)]
    getattr(lib, call.name)(*pointers, *map(ctypes.c_int32, call.integers), ctypes.c_void_p(out.ctypes.data))
    return out


def reference(hidden: np.ndarray, weights: np.ndarray, call: Call) -> np.ndarray:
    """Pool in float64, window by window, straight from the definition."""
    hidden = hidden.astype(np.float64)
    if call.gelu:
        hidden = exact_gelu(hidden)
    counts = [(i - k) // s + 1 for i, k, s in zip(call.size, call.kernel, call.stride)]
    rows = []
    for window in np.ndindex(*counts):
        cut = tuple(slice(i * s, i * s + k) for i, s, k in zip(window, call.stride, call.kernel))
        score = weights[cut].astype(np.float64).ravel() / np.float64(np.float32(call.temperature))
        share = np.exp(score - score.max())
        rows.append(share / share.sum() @ hidden[cut].reshape(-1, call.channels))
    return np.array(rows)


def exact_gelu(x: np.ndarray) -> np.ndarray:
    """x · Φ(x), by erf."""
    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def to_bfloat(values: np.ndarray) -> np.ndarray:
    """float32 → the bits of bfloat16, to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 → float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class FakeCudaCore:
    """The part of cuda.core that the kernels use, with host addresses and host functions.

    Attributes:
        launches: Kernel name and launch configuration of every launch.
    """

    def __init__(self, lib: ctypes.CDLL, capability: tuple[int, int] = (8, 7)):
        self.lib = lib
        self.capability = capability
        self.launches: list[tuple[str, Any]] = []
        outer = self

        class Device:
            default_stream = "default"

            def set_current(self) -> None: ...

            @property
            def compute_capability(self) -> tuple[int, int]:
                return outer.capability

        class View:
            def __init__(self, array: np.ndarray):
                array = getattr(array, "in_device_memory", array)
                if not isinstance(array, np.ndarray):
                    raise TypeError("no such interface")
                item = array.itemsize
                self.ptr = array.ctypes.data
                self.shape = array.shape
                self.strides = tuple(s // item for s in array.strides)
                self.dtype = array.dtype
                self.is_device_accessible = True

            @classmethod
            def from_any_interface(cls, array: np.ndarray, stream_ptr: int) -> Any:
                return cls(array)

        class Code:
            def get_kernel(self, name: str) -> str:
                return name

        class Program:
            def __init__(self, source: str, language: str, options: Any):
                assert '#include "' not in source and "__global__" in source and language == "c++"

            def compile(self, form: str, name_expressions: tuple[str, ...]) -> Code:
                assert all(hasattr(outer.lib, name) for name in name_expressions)
                return Code()

        self.Device = Device
        self.Program = Program
        self.utils = type("utils", (), {"StridedMemoryView": View})
        self.ProgramOptions = lambda **options: options
        self.LaunchConfig = lambda grid, block: (grid, block)
        self.Stream = type("Stream", (), {"from_handle": staticmethod(lambda handle: ("stream", handle))})

    def launch(self, stream: Any, config: Any, kernel: str, *arguments: Any) -> None:
        self.launches.append((kernel, config))
        getattr(self.lib, kernel)(*arguments)
