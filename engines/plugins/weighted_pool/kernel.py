"""The pooling kernel: compiled on the machine that runs it, launched on arrays in GPU memory.

cuda-core compiles (NVRTC) and launches. Arrays of torch, CuPy, pycuda or numba are passed through
`__cuda_array_interface__` or DLPack, without a copy. Not yet run on hardware (docs/limitations.md); tests run
the same calls over the host build of the same arithmetic.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ppllava_edge.engines.bundle.windows import Triple
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.plugins.compiling import compile_source, import_cuda_core, one_line, open_device

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "weighted_pool.cu"
HEADER = FOLDER / "weighted_pool.cuh"
THREADS = 128  # kThreads
ACCESS_BYTES = 16  # the widest memory access of a thread
SUFFIX = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
MIN_CAPABILITY = (7, 5)


def lanes_of(dtype: str, channels: int, aligned: bool = True) -> int:
    """Channels per thread: 16 bytes of them, or one where rows don't start at multiples of 16 bytes."""
    wide = ACCESS_BYTES // ITEMSIZE[dtype]
    return wide if aligned and channels % wide == 0 else 1


def kernel_name(dtype: str, gelu: bool, lanes: int) -> str:
    """The name of a variant in weighted_pool.cu."""
    return f"weighted_pool_{SUFFIX[dtype]}{'_gelu' if gelu else ''}{'' if lanes > 1 else '_single'}"


def float_bits(value: float) -> int:
    """The bits of a float32 as an integer: the form in which the kernel takes the temperature."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


@dataclass(frozen=True)
class Call:
    """One pooling: hidden (T, H, W, C), weights (T, H, W) float32 → (N, C).

    Attributes:
        size: T, H, W.
        channels: C.
        kernel, stride: Windows along frames, rows and columns.
        temperature: Temperature of the softmax inside a window.
        dtype: Type of hidden and the result: float32, float16 or bfloat16.
        gelu: Apply the projector's GELU to hidden as it is read.
        aligned: Whether all arrays start at multiples of 16 bytes.

    Raises:
        EngineError: If the kernel doesn't support the sizes or types.
    """

    size: Triple
    channels: int
    kernel: Triple
    stride: Triple
    temperature: float
    dtype: str
    gelu: bool = False
    aligned: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in SUFFIX:
            raise EngineError(f"weighted pooling takes {', '.join(SUFFIX)}, not {self.dtype}")
        too_large = any(k > s for k, s in zip(self.kernel, self.size))
        if self.channels < 1 or min(*self.kernel, *self.stride) < 1 or too_large:
            raise EngineError(
                f"weighted pooling: windows of {self.kernel} with stride {self.stride} "
                f"don't fit {self.size}, {self.channels} channels"
            )
        if not self.temperature > 0:
            raise EngineError(f"weighted pooling: the temperature must be above 0, not {self.temperature}")
        if max(self.windows, math.prod(self.size)) >= 1 << 31:
            raise EngineError(f"weighted pooling: {self.size} is more than the kernel can count")

    @property
    def windows(self) -> int:
        """N: the rows of the result."""
        return math.prod((i - k) // s + 1 for i, k, s in zip(self.size, self.kernel, self.stride))

    @property
    def lanes(self) -> int:
        """Channels per thread."""
        return lanes_of(self.dtype, self.channels, self.aligned)

    @property
    def name(self) -> str:
        """The kernel variant's name."""
        return kernel_name(self.dtype, self.gelu, self.lanes)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks: one per window and THREADS × lanes channels."""
        return self.windows, -(-self.channels // (THREADS * self.lanes)), 1

    @property
    def integers(self) -> tuple[int, ...]:
        """The kernel's arguments between its inputs and its output."""
        return (*self.size, self.channels, *self.kernel, *self.stride, float_bits(self.temperature))


def source() -> str:
    """The kernel's source with its header inlined."""
    header = HEADER.read_text(encoding="utf-8").replace("#pragma once\n", "")
    return SOURCE.read_text(encoding="utf-8").replace('#include "weighted_pool.cuh"\n', header)


@cache
def compile_kernels(capability: tuple[int, int], form: str = "cubin") -> Any:
    """Compile all variants for one compute capability. Needs no GPU.

    Args:
        capability: Major and minor.
        form: "cubin" or "ptx".

    Returns:
        A cuda-core ObjectCode.

    Raises:
        EngineError: If cuda-core is missing or the capability too old.
    """
    core = import_cuda_core()
    if capability < MIN_CAPABILITY:
        raise EngineError(
            f"compute capability {capability[0]}.{capability[1]} is too old: "
            f"the pooling kernel needs 7.5 or later"
        )
    names = tuple(
        f"weighted_pool_{suffix}{gelu}{single}"
        for suffix in SUFFIX.values()
        for gelu in ("", "_gelu")
        for single in ("", "_single")
    )
    return compile_source(core, source(), capability, names, "the pooling kernel", form)


class Launcher:
    """Launches the kernel on one device; compiled on first use. Safe to use from several threads.

    Args:
        device: A cuda-core device; None: the default one.

    Attributes:
        core: The module cuda.core.
        device: The device.
        capability: Its compute capability.

    Raises:
        EngineError: If cuda-core or a usable device is missing.
    """

    def __init__(self, device: Any = None):
        self.core = import_cuda_core()
        self.device, self.capability = open_device(self.core, device)
        self._lock = threading.Lock()
        self._kernels: dict[str, Any] = {}

    def launch(self, call: Call, hidden: int, weights: int, out: int, stream: Any) -> None:
        """Queue one pooling.

        Args:
            call: Sizes and types.
            hidden, weights, out: Device addresses.
            stream: A cuda-core stream, or a stream's handle.

        Raises:
            EngineError: If the kernel can't be compiled.
        """
        with self._lock:
            if call.name not in self._kernels:
                self._kernels[call.name] = compile_kernels(self.capability).get_kernel(call.name)
        if isinstance(stream, int):
            stream = self.core.Stream.from_handle(stream)
        config = self.core.LaunchConfig(grid=call.grid, block=THREADS)
        arguments = [
            ctypes.c_void_p(hidden),
            ctypes.c_void_p(weights),
            *map(ctypes.c_int32, call.integers),
            ctypes.c_void_p(out),
        ]
        self.core.launch(stream, config, self._kernels[call.name], *arguments)

    def pool(
        self,
        hidden: Any,
        weights: Any,
        out: Any,
        kernel: Triple,
        stride: Triple,
        temperature: float = 0.01,
        gelu: bool = False,
        stream: Any = None,
    ) -> Any:
        """Pool device arrays; asynchronous.

        Arrays are C-contiguous and have `__cuda_array_interface__` or `__dlpack__`.

        Args:
            hidden: (T, H, W, C) float32, float16 or bfloat16.
            weights: (T, H, W) float32.
            out: (N, C) of hidden's type; written.
            kernel, stride: Windows along frames, rows and columns.
            temperature: Temperature of the softmax inside a window.
            gelu: Apply the projector's GELU to hidden as it is read.
            stream: A cuda-core stream, an object with `__cuda_stream__`, or None for the device's default.

        Returns:
            out.

        Raises:
            EngineError: If shapes or types don't fit.
        """
        stream = self.device.default_stream if stream is None else stream
        rows = _view(self.core, hidden, "hidden", stream)
        scores = _view(self.core, weights, "weights", stream)
        result = _view(self.core, out, "out", stream)
        if len(rows.shape) != 4 or scores.shape != rows.shape[:3] or scores.dtype != "float32":
            raise EngineError(
                f"weighted pooling takes hidden (T,H,W,C) and weights (T,H,W) float32, "
                f"not {rows.shape} and {scores.shape} {scores.dtype}"
            )
        t, h, w, channels = rows.shape
        aligned = (rows.address | result.address) % ACCESS_BYTES == 0
        call = Call((t, h, w), channels, kernel, stride, temperature, rows.dtype, gelu, aligned)
        if result.shape != (call.windows, channels) or result.dtype != rows.dtype:
            raise EngineError(
                f"weighted pooling gives {(call.windows, channels)} {rows.dtype}; "
                f"out is {result.shape} {result.dtype}"
            )
        self.launch(call, rows.address, scores.address, result.address, stream)
        return out


@dataclass(frozen=True)
class _DeviceArray:
    address: int
    shape: tuple[int, ...]
    dtype: str


def _view(core: Any, array: Any, name: str, stream: Any) -> _DeviceArray:
    try:
        view = core.utils.StridedMemoryView.from_any_interface(
            array, stream_ptr=int(getattr(stream, "handle", -1))
        )
    except Exception as error:
        raise EngineError(
            f"weighted pooling: {name} is not a device array ({one_line(error, 160)})"
        ) from None
    if not view.is_device_accessible:
        raise EngineError(f"weighted pooling: {name} is in host memory; it must be on the GPU")
    shape = tuple(view.shape)
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if view.strides is not None and tuple(view.strides) != contiguous:
        raise EngineError(f"weighted pooling: {name} must be C-contiguous")
    return _DeviceArray(int(view.ptr), shape, str(view.dtype))
