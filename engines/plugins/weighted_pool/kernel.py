"""The kernel as seen from Python: compiled where it runs, launched on arrays that lie on the GPU already.

cuda-core compiles (NVRTC) and launches; torch, CuPy, pycuda, numba arrays come and go through `__cuda_array_interface__` or DLPack, without
a copy. Not run on real hardware yet (docs/limitations.md); tests run the same calls over the host build of the same arithmetic.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ppllava_edge.engines.bundle.windows import Triple
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.plugins.compiling import compile_source, open_device

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "weighted_pool.cu"
HEADER = FOLDER / "weighted_pool.cuh"
THREADS = 128  # kThreads
SUFFIX = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
MIN_CAPABILITY = (7, 5)


def lanes_of(dtype: str, channels: int, aligned: bool = True) -> int:
    """Channels that a thread takes: 16 bytes of them, or one where rows don't start at multiples of 16 bytes."""
    wide = 16 // ITEMSIZE[dtype]
    return wide if aligned and channels % wide == 0 else 1


def kernel_name(dtype: str, gelu: bool, lanes: int) -> str:
    """As weighted_pool.cu names its variants."""
    return f"weighted_pool_{SUFFIX[dtype]}{'_gelu' if gelu else ''}{'' if lanes > 1 else '_single'}"


def float_bits(value: float) -> int:
    """A float's bits as an integer: how the temperature travels to the kernel."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


@dataclass(frozen=True)
class Call:
    """One pooling: hidden (T,H,W,C) of a dtype, weights (T,H,W) float32 → (N,C). gelu: applied to hidden as it is read."""

    size: Triple
    channels: int
    kernel: Triple
    stride: Triple
    temperature: float
    dtype: str
    gelu: bool = False
    aligned: bool = True  # whether all arrays start at multiples of 16 bytes

    def __post_init__(self) -> None:
        if self.dtype not in SUFFIX:
            raise EngineError(f"weighted pooling takes {', '.join(SUFFIX)}, not {self.dtype}")
        if (
            self.channels < 1
            or min(*self.kernel, *self.stride) < 1
            or any(k > s for k, s in zip(self.kernel, self.size))
        ):
            raise EngineError(
                f"weighted pooling: windows of {self.kernel} with stride {self.stride} don't fit {self.size}, {self.channels} channels"
            )
        if not self.temperature > 0:
            raise EngineError(f"weighted pooling: the temperature must be above 0, not {self.temperature}")
        if max(self.windows, self.size[0] * self.size[1] * self.size[2]) >= 1 << 31:
            raise EngineError(f"weighted pooling: {self.size} is more than the kernel can count")

    @property
    def windows(self) -> int:
        """N: rows of the result."""
        t, h, w = ((i - k) // s + 1 for i, k, s in zip(self.size, self.kernel, self.stride))
        return t * h * w

    @property
    def lanes(self) -> int:
        """Channels that a thread takes."""
        return lanes_of(self.dtype, self.channels, self.aligned)

    @property
    def name(self) -> str:
        """Of the kernel that does it."""
        return kernel_name(self.dtype, self.gelu, self.lanes)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks: one per window and THREADS × lanes channels."""
        return self.windows, -(-self.channels // (THREADS * self.lanes)), 1

    @property
    def integers(self) -> tuple[int, ...]:
        """The kernel's arguments between its inputs and its output."""
        return (*self.size, self.channels, *self.kernel, *self.stride, float_bits(self.temperature))


def import_cuda_core() -> Any:
    """The library, or one line that names the extra to install. Raises EngineError."""
    try:
        from cuda import core
    except ImportError:
        raise EngineError("the pooling kernel needs cuda-core: pip install 'ppllava-edge[cuda]'") from None
    return core


def source() -> str:
    """The kernel's source in one piece: its header stands in it."""
    header = HEADER.read_text(encoding="utf-8").replace("#pragma once\n", "")
    return SOURCE.read_text(encoding="utf-8").replace('#include "weighted_pool.cuh"\n', header)


@cache
def compile_kernels(capability: tuple[int, int], form: str = "cubin") -> Any:
    """All variants for one compute capability, as cuda-core's ObjectCode. form: cubin or ptx. Needs no GPU. Raises EngineError."""
    core = import_cuda_core()
    if capability < MIN_CAPABILITY:
        raise EngineError(
            f"compute capability {capability[0]}.{capability[1]} is too old: the pooling kernel needs 7.5 or later"
        )
    names = tuple(
        f"weighted_pool_{suffix}{gelu}{single}"
        for suffix in SUFFIX.values()
        for gelu in ("", "_gelu")
        for single in ("", "_single")
    )
    return compile_source(core, source(), capability, names, "the pooling kernel", form)


class Launcher:
    """Launches on one device. The kernel is compiled once, on first use."""

    def __init__(self, device: Any = None):
        self.core = import_cuda_core()
        self.device, self.capability = open_device(self.core, device)
        self._lock = threading.Lock()
        self._kernels: dict[str, Any] = {}

    def launch(self, call: Call, hidden: int, weights: int, out: int, stream: Any) -> None:
        """Queue one pooling on a stream (cuda-core's, or its handle). hidden, weights, out: device addresses."""
        import ctypes

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
        """Pool device arrays: hidden (T,H,W,C), weights (T,H,W) float32, into out (N,C) of hidden's type; returns out. Asynchronous.

        Arrays: anything with `__cuda_array_interface__` or `__dlpack__`, C-contiguous. stream: cuda-core's, an object with
        `__cuda_stream__`, or None for the device's default. Raises EngineError if shapes or types don't fit.
        """
        stream = self.device.default_stream if stream is None else stream
        views = [
            _view(self.core, array, name, stream)
            for array, name in ((hidden, "hidden"), (weights, "weights"), (out, "out"))
        ]
        (
            (address, shape, dtype),
            (weights_address, weights_shape, weights_dtype),
            (out_address, out_shape, out_dtype),
        ) = views
        if len(shape) != 4 or weights_shape != shape[:3] or weights_dtype != "float32":
            raise EngineError(
                f"weighted pooling takes hidden (T,H,W,C) and weights (T,H,W) float32, not {shape} and {weights_shape} {weights_dtype}"
            )
        aligned = (address | out_address) % 16 == 0
        call = Call(
            (shape[0], shape[1], shape[2]), shape[3], kernel, stride, temperature, dtype, gelu, aligned
        )
        if out_shape != (call.windows, shape[3]) or out_dtype != dtype:
            raise EngineError(
                f"weighted pooling gives {(call.windows, shape[3])} {dtype}; out is {out_shape} {out_dtype}"
            )
        self.launch(call, address, weights_address, out_address, stream)
        return out


def _view(core: Any, array: Any, name: str, stream: Any) -> tuple[int, tuple[int, ...], str]:
    """(address, shape, dtype) of a device array."""
    try:
        view = core.utils.StridedMemoryView.from_any_interface(
            array, stream_ptr=int(getattr(stream, "handle", -1))
        )
    except Exception as error:
        raise EngineError(
            f"weighted pooling: {name} is no device array ({' '.join(str(error).split())[:160]})"
        ) from None
    if not view.is_device_accessible:
        raise EngineError(f"weighted pooling: {name} lies in host memory; it must be on the GPU")
    shape, strides = tuple(view.shape), view.strides
    contiguous = tuple(_product(shape[i + 1 :]) for i in range(len(shape)))
    if strides is not None and tuple(strides) != contiguous:
        raise EngineError(f"weighted pooling: {name} must be C-contiguous")
    return int(view.ptr), shape, str(view.dtype)


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
