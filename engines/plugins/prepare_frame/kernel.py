"""A frame in GPU memory → pixels for the vision tower, without a copy to the host.

The result is that of runtime/vision/preprocess.py with Pillow, bit for bit where Pillow resamples rows first:
always up to version 12; from version 13 on, Pillow resamples columns first for some shapes, and a few pixels
are rounded differently.

Frames are passed through `__cuda_array_interface__` or DLPack (torch, CuPy, pycuda, DeepStream). Not yet run
on hardware (docs/limitations.md); tests run the same calls over the host build of the same arithmetic.
"""

from __future__ import annotations

import ctypes
import re
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.backends.device_memory import Buffer
from ppllava_edge.engines.bundle.manifest import Preprocessing
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.engines.plugins.compiling import compile_source, import_cuda_core, one_line, open_device
from ppllava_edge.engines.plugins.prepare_frame.letterbox import letterbox
from ppllava_edge.engines.plugins.prepare_frame.resampling import resampling_weights
from ppllava_edge.engines.plugins.weighted_pool.kernel import HEADER

FOLDER = Path(__file__).parent
KERNELS = ("resample_rows", "resample_columns", "normalise_frame_f32", "normalise_frame_f16")
THREADS = 256
CUDA_DLPACK = 2  # kDLCUDA


def source() -> str:
    """The kernels' source with its headers inlined."""
    numbers = HEADER.read_text(encoding="utf-8").replace("#pragma once\n", "")
    header = (FOLDER / "prepare_frame.cuh").read_text(encoding="utf-8").replace("#pragma once\n", "")
    header = re.sub('#include "../weighted_pool/weighted_pool.cuh".*\n', lambda match: numbers, header)
    kernels = (FOLDER / "prepare_frame.cu").read_text(encoding="utf-8")
    return kernels.replace('#include "prepare_frame.cuh"\n', header)


@cache
def compile_kernels(capability: tuple[int, int]) -> Any:
    """Compile the kernels for one compute capability. Needs no GPU.

    Returns:
        A cuda-core ObjectCode.

    Raises:
        EngineError: If cuda-core is missing or the compiler refuses the source.
    """
    return compile_source(import_cuda_core(), source(), capability, KERNELS, "frame preparation")


def is_device_frame(frame: Any) -> bool:
    """Whether an object is an array in GPU memory with `__cuda_array_interface__` or DLPack."""
    if isinstance(frame, np.ndarray):
        return False
    if hasattr(frame, "__cuda_array_interface__"):
        return True
    device = getattr(frame, "__dlpack_device__", None)
    return device is not None and int(device()[0]) == CUDA_DLPACK


@dataclass(frozen=True)
class _Picture:
    """A picture (H, W, channels) uint8 in GPU memory; strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _AxisWeights:
    """Resampling weights of one axis in GPU memory."""

    bounds: Buffer
    weights: Buffer
    taps: int


class FramePreparer:
    """Prepares frames on one GPU. Safe to use from several threads.

    Args:
        gpu: The GPU that holds the frames.
        preprocessing: The bundle's preprocessing parameters.
        dtype: Type of the pixels: float32 or float16.

    Raises:
        EngineError: If cuda-core is missing or the kernels can't be compiled.
    """

    def __init__(self, gpu: CudaDevice, preprocessing: Preprocessing, dtype: Any = np.float32):
        self.dtype = np.dtype(dtype)
        self.gpu = gpu
        self.preprocessing = preprocessing
        self.core = import_cuda_core()
        _, capability = open_device(self.core)
        code = compile_kernels(capability)
        self._kernels = {name: code.get_kernel(name) for name in KERNELS}
        self._weights: dict[tuple[int, int], _AxisWeights] = {}
        self._lock = threading.Lock()

    def prepare(self, frame: Any) -> tuple[Buffer, Buffer]:
        """Resize and normalise a frame. Asynchronous: the frame must stay unchanged until the GPU is done.

        Args:
            frame: RGB or RGBA uint8 (H, W, 3 or 4) on this GPU, with any strides.

        Returns:
            Pixels (1, 3, size, size) and the resized picture (size, size, 3) uint8.

        Raises:
            MediaError: If the frame isn't RGB or RGBA uint8 on this GPU.
        """
        picture = self._view(frame)
        p = self.preprocessing
        side = p.size
        with self._lock, self.gpu.lock:
            self.gpu.enter()
            if p.method == "squash":
                canvas = self.gpu.empty((side, side, 3), np.uint8)
                self._resize(picture, canvas, (side, side))
            else:
                canvas = self._fit(picture, side)
            pixels = self.gpu.empty((1, 3, side, side), self.dtype)
            self._launch(
                f"normalise_frame_f{8 * self.dtype.itemsize}",
                3 * side * side,
                _pointer(canvas),
                ctypes.c_int32(side),
                *(ctypes.c_float(value) for value in (*p.mean, *p.std)),
                _pointer(pixels),
            )
        return pixels, canvas

    def _fit(self, picture: _Picture, side: int) -> Buffer:
        """Resize with the aspect kept, centred on black; stretch a canvas that is one pixel short."""
        height, width = picture.shape[:2]
        fitted = letterbox(height, width, side, side)
        canvas = self.gpu.zeros((*fitted.canvas, 3), np.uint8)
        self._resize(picture, canvas, (fitted.height, fitted.width), fitted.top, fitted.left)
        if canvas.shape == (side, side, 3):
            return canvas
        stretched = self.gpu.empty((side, side, 3), np.uint8)
        dense = _Picture(canvas.address, canvas.shape, (canvas.shape[1] * 3, 3, 1))
        self._resize(dense, stretched, (side, side))
        return stretched

    def _resize(
        self, picture: _Picture, canvas: Buffer, size: tuple[int, int], top: int = 0, left: int = 0
    ) -> None:
        """Resize a picture to (height, width) and write it into the canvas at (top, left)."""
        height, width = size
        along_rows = self._weights_for(picture.shape[1], width)
        along_columns = self._weights_for(picture.shape[0], height)
        rows = self.gpu.empty((picture.shape[0], width, 3), np.uint8)
        self._launch(
            "resample_rows",
            picture.shape[0] * width * 3,
            ctypes.c_void_p(picture.address),
            *map(ctypes.c_int64, picture.strides),
            ctypes.c_int32(picture.shape[0]),
            ctypes.c_int32(width),
            _pointer(along_rows.bounds),
            _pointer(along_rows.weights),
            ctypes.c_int32(along_rows.taps),
            _pointer(rows),
        )
        self._launch(
            "resample_columns",
            height * width * 3,
            _pointer(rows),
            ctypes.c_int32(height),
            ctypes.c_int32(width),
            _pointer(along_columns.bounds),
            _pointer(along_columns.weights),
            ctypes.c_int32(along_columns.taps),
            _pointer(canvas),
            *map(ctypes.c_int32, (canvas.shape[1], left, top)),
        )

    def _weights_for(self, size: int, new_size: int) -> _AxisWeights:
        """The weights of an axis, uploaded on first use."""
        if (size, new_size) not in self._weights:
            bounds, weights = resampling_weights(size, new_size)
            self._weights[size, new_size] = _AxisWeights(
                self.gpu.upload(bounds), self.gpu.upload(weights), weights.shape[1]
            )
        return self._weights[size, new_size]

    def _launch(self, name: str, elements: int, *arguments: Any) -> None:
        """Launch a kernel with one thread per element."""
        config = self.core.LaunchConfig(grid=(-(-elements // THREADS), 1, 1), block=THREADS)
        stream = self.core.Stream.from_handle(self.gpu.stream)
        self.core.launch(stream, config, self._kernels[name], *arguments)

    def _view(self, frame: Any) -> _Picture:
        """A frame as a picture; the device's stream waits for the work that produces it."""
        try:
            view = self.core.utils.StridedMemoryView.from_any_interface(frame, stream_ptr=self.gpu.stream)
        except Exception as error:
            raise MediaError(f"the frame can't be taken from the GPU ({one_line(error, 160)})") from None
        shape = tuple(int(n) for n in view.shape)
        is_picture = len(shape) == 3 and shape[2] in (3, 4) and str(view.dtype) == "uint8"
        if not is_picture or not view.is_device_accessible:
            raise MediaError(
                f"a frame on the GPU must be RGB uint8 (height, width, 3), not {view.dtype} {shape}"
            )
        strides = view.strides if view.strides is not None else (shape[1] * shape[2], shape[2], 1)
        return _Picture(int(view.ptr), shape, tuple(int(s) for s in strides))


def _pointer(buffer: Buffer) -> ctypes.c_void_p:
    return ctypes.c_void_p(buffer.address)
