"""A frame in GPU memory → pixels for the vision tower, without a copy to the host: what runtime/preprocess.py does with Pillow, bit for bit where Pillow
resamples rows first (always up to version 12; from 13 on it begins with the columns of some shapes, and a few levels are rounded otherwise).

Frames come through `__cuda_array_interface__` or DLPack (torch, CuPy, pycuda, DeepStream). Not run on real hardware yet (docs/limitations.md); tests run the
same calls over the host build of the same arithmetic.
"""

from __future__ import annotations

import ctypes
import math
import re
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.backends.device_memory import Buffer
from ppllava_edge.engines.bundle.manifest import Preprocessing
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.engines.plugins.compiling import compile_source, open_device
from ppllava_edge.engines.plugins.prepare_frame.letterbox import letterbox
from ppllava_edge.engines.plugins.weighted_pool.kernel import HEADER, import_cuda_core

FOLDER = Path(__file__).parent
KERNELS = ("resample_rows", "resample_columns", "normalise_frame_f32", "normalise_frame_f16")
PRECISION = 22  # bits of the weights' fraction, Pillow's
SUPPORT = 2.0  # of the bicubic filter
THREADS = 256


def bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -0.5, as Pillow's BICUBIC."""
    x, a = np.abs(x), -0.5
    near, far = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@cache
def weights_of(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Resampling `size` pixels to `wanted`: bounds (wanted,2) int32, first input and how many; weights (wanted,taps) int32 in fixed point.

    As Pillow's precompute_coeffs and normalize_coeffs_8bpc: the filter is stretched when shrinking, weights sum to one before they are rounded.
    """
    scale = size / wanted
    stretch = max(scale, 1.0)
    support = SUPPORT * stretch
    taps = math.ceil(support) * 2 + 1
    bounds, weights = np.zeros((wanted, 2), np.int32), np.zeros((wanted, taps), np.int32)
    for at in range(wanted):
        centre = (at + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), size)
        row = bicubic((np.arange(first, last) - centre + 0.5) / stretch)
        total = 0.0
        for value in row:  # one after another, as there: the order decides the last bit
            total += float(value)
        scaled = row / total * (1 << PRECISION)
        bounds[at] = first, last - first
        weights[at, : last - first] = np.trunc(np.where(scaled < 0, scaled - 0.5, scaled + 0.5))
    return bounds, weights


def source() -> str:
    """The kernels' source in one piece."""
    numbers = HEADER.read_text(encoding="utf-8").replace("#pragma once\n", "")
    header = (FOLDER / "prepare_frame.cuh").read_text(encoding="utf-8").replace("#pragma once\n", "")
    header = re.sub('#include "../weighted_pool/weighted_pool.cuh".*\n', lambda match: numbers, header)
    return (
        (FOLDER / "prepare_frame.cu")
        .read_text(encoding="utf-8")
        .replace('#include "prepare_frame.cuh"\n', header)
    )


@cache
def compile_kernels(capability: tuple[int, int]) -> Any:
    """For one compute capability, as cuda-core's ObjectCode. Needs no GPU. Raises EngineError."""
    return compile_source(import_cuda_core(), source(), capability, KERNELS, "frame preparation")


def is_device_frame(frame: Any) -> bool:
    """Whether an object lies in GPU memory and says where."""
    if isinstance(frame, np.ndarray):
        return False
    if hasattr(frame, "__cuda_array_interface__"):
        return True
    device = getattr(frame, "__dlpack_device__", None)
    return device is not None and int(device()[0]) == 2  # kDLCUDA


class FramePreparer:
    """Prepares frames on one GPU. Weights for a size are uploaded once. dtype: of the pixels, float32 or float16."""

    def __init__(self, gpu: CudaDevice, preprocessing: Preprocessing, dtype: Any = np.float32):
        self.dtype = np.dtype(dtype)
        self.gpu, self.preprocessing, self.core = gpu, preprocessing, import_cuda_core()
        _, capability = open_device(self.core)
        code = compile_kernels(capability)
        self._kernels = {name: code.get_kernel(name) for name in KERNELS}
        self._weights: dict[tuple[int, int], tuple[Buffer, Buffer, int]] = {}
        self._lock = threading.Lock()

    def prepare(self, frame: Any) -> tuple[Buffer, Buffer]:
        """RGB (or RGBA) uint8 (H,W,3 or 4) on this GPU, any strides → pixels (1,3,size,size) and the resized picture (size,size,3) uint8.

        Queued, not waited for; the frame must stay as it is until then. Raises MediaError if it isn't such a frame.
        """
        address, shape, strides = self._view(frame)
        p, side = self.preprocessing, self.preprocessing.size
        with self._lock, self.gpu.lock:
            self.gpu.enter()
            if p.method == "squash":
                canvas = self.gpu.empty((side, side, 3), np.uint8)
                self._resize(address, shape, strides, canvas, (side, side), 0, 0)
            else:
                canvas = self._fit(address, shape, strides, side)
            pixels = self.gpu.empty((1, 3, side, side), self.dtype)
            constants = [ctypes.c_float(value) for value in (*p.mean, *p.std)]
            self._launch(
                f"normalise_frame_f{8 * self.dtype.itemsize}",
                3 * side * side,
                _pointer(canvas),
                ctypes.c_int32(side),
                *constants,
                _pointer(pixels),
            )
        return pixels, canvas

    def _fit(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], side: int) -> Buffer:
        """Resize with the aspect kept, centred on black; stretch a canvas that is one pixel short."""
        fitted = letterbox(*shape[:2], side, side)
        canvas = self.gpu.zeros((*fitted.canvas, 3), np.uint8)
        size = fitted.height, fitted.width
        self._resize(address, shape, strides, canvas, size, fitted.top, fitted.left)
        if canvas.shape == (side, side, 3):
            return canvas
        stretched = self.gpu.empty((side, side, 3), np.uint8)
        self._resize(canvas.address, canvas.shape, (canvas.shape[1] * 3, 3, 1), stretched, (side, side), 0, 0)
        return stretched

    def _resize(
        self,
        address: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        canvas: Buffer,
        size: tuple[int, int],
        top: int,
        left: int,
    ) -> None:
        """A picture at an address, resized to (height, width) into a place of the canvas."""
        (bounds, weights, taps), (bounds_down, weights_down, taps_down) = (
            self._weights_for(shape[1], size[1]),
            self._weights_for(shape[0], size[0]),
        )
        rows = self.gpu.empty((shape[0], size[1], 3), np.uint8)
        self._launch(
            "resample_rows",
            shape[0] * size[1] * 3,
            ctypes.c_void_p(address),
            *map(ctypes.c_int64, strides),
            ctypes.c_int32(shape[0]),
            ctypes.c_int32(size[1]),
            _pointer(bounds),
            _pointer(weights),
            ctypes.c_int32(taps),
            _pointer(rows),
        )
        self._launch(
            "resample_columns",
            size[0] * size[1] * 3,
            _pointer(rows),
            ctypes.c_int32(size[0]),
            ctypes.c_int32(size[1]),
            _pointer(bounds_down),
            _pointer(weights_down),
            ctypes.c_int32(taps_down),
            _pointer(canvas),
            *map(ctypes.c_int32, (canvas.shape[1], left, top)),
        )

    def _weights_for(self, size: int, wanted: int) -> tuple[Buffer, Buffer, int]:
        if (size, wanted) not in self._weights:
            bounds, weights = weights_of(size, wanted)
            self._weights[size, wanted] = self.gpu.upload(bounds), self.gpu.upload(weights), weights.shape[1]
        return self._weights[size, wanted]

    def _launch(self, name: str, elements: int, *arguments: Any) -> None:
        config = self.core.LaunchConfig(grid=(-(-elements // THREADS), 1, 1), block=THREADS)
        self.core.launch(
            self.core.Stream.from_handle(self.gpu.stream), config, self._kernels[name], *arguments
        )

    def _view(self, frame: Any) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Address, shape and strides in bytes. The producer's work is waited for on our stream."""
        try:
            view = self.core.utils.StridedMemoryView.from_any_interface(frame, stream_ptr=self.gpu.stream)
        except Exception as error:
            raise MediaError(
                f"the frame can't be taken from the GPU ({' '.join(str(error).split())[:160]})"
            ) from None
        shape = tuple(int(n) for n in view.shape)
        if (
            len(shape) != 3
            or shape[2] not in (3, 4)
            or str(view.dtype) != "uint8"
            or not view.is_device_accessible
        ):
            raise MediaError(
                f"a frame on the GPU must be RGB uint8 (height, width, 3), not {view.dtype} {shape}"
            )
        strides = view.strides if view.strides is not None else (shape[1] * shape[2], shape[2], 1)
        return int(view.ptr), shape, tuple(int(s) for s in strides)


def _pointer(buffer: Buffer) -> ctypes.c_void_p:
    return ctypes.c_void_p(buffer.address)
