"""Memory, copies and captured work on one GPU, through the CUDA driver: what the GPU backends stand on.

Everything is queued on one stream, in order; only download() and synchronize() wait. Several threads may queue work: each holds `work` while it
does, and for as long as it captures, so that nobody else's work gets into its graph. Tests put a double in the driver's place.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import EngineError

PINNED_BUFFERS = 2  # uploads under way at once: frames are copied while the next ones are decoded


@dataclass(frozen=True)
class Buffer:
    """Memory of a device: address, shape (C-contiguous), dtype. owner keeps it alive. np.asarray(buffer) waits and copies it to the host."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype
    owner: Any
    device: Any

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> Buffer:
        """Some rows along the first axis, in place."""
        each = self.nbytes // self.shape[0] if self.shape[0] else 0
        return replace(self, address=self.address + first * each, shape=(count, *self.shape[1:]))

    def reshape(self, *shape: int) -> Buffer:
        """The same memory, read otherwise."""
        assert int(np.prod(shape, dtype=np.int64)) == int(np.prod(self.shape, dtype=np.int64))
        return replace(self, shape=shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.device.download(self)
        return array if dtype is None else array.astype(dtype)


class _Memory:
    """One block of device memory. When nothing refers to it any more it is kept for the next one of its size: everything runs in one stream, in
    order, so a block can be used again at once, while giving it back to the driver would wait for the GPU (and spoil a capture)."""

    def __init__(self, returned: list[tuple[int, int]], size: int, address: int):
        self.returned, self.size, self.address = returned, size, address

    def __del__(self) -> None:
        self.returned.append((self.size, self.address))


class CudaDevice:
    """The first GPU (CUDA_VISIBLE_DEVICES chooses). driver: cuda.bindings.driver, or a double.

    Raises EngineError in one line if there is no driver, no GPU, or no memory (how much was missing).
    """

    def __init__(self, driver: Any = None):
        self.driver = driver or _import_driver()
        self.work = threading.RLock()
        self.call("cuInit", 0)
        if not self.call("cuDeviceGetCount"):
            raise EngineError("no NVIDIA GPU was found; ppllava-doctor says what is missing")
        ordinal = self.call("cuDeviceGet", 0)
        self.context = self.call("cuDevicePrimaryCtxRetain", ordinal)
        self.call("cuCtxSetCurrent", self.context)
        self._stream = self.call("cuStreamCreate", 1)  # waits for no other stream
        self.stream = int(self._stream)
        self._pinned: list[_Pinned] = []
        self._returned: list[
            tuple[int, int]
        ] = []  # (size, address) of blocks that nothing refers to; filled by whoever drops the last reference
        self._spare: dict[int, list[int]] = {}  # size → blocks that can be used again

    def call(self, name: str, *arguments: Any) -> Any:
        """One call of the driver. Raises EngineError if it fails."""
        status, *results = getattr(self.driver, name)(*arguments)
        if int(status) == 2:  # CUDA_ERROR_OUT_OF_MEMORY
            raise EngineError(
                self._out_of_memory(int(arguments[0]) if name in ("cuMemAlloc", "cuMemHostAlloc") else 0)
            )
        if int(status):
            raise EngineError(
                f"{name} failed: {_status_name(self.driver, status)}; ppllava-doctor says what is missing"
            )
        return results[0] if len(results) == 1 else results

    def _out_of_memory(self, wanted: int) -> str:
        status, free, total = self.driver.cuMemGetInfo()
        if int(status) or not wanted:
            return "the GPU is out of memory; use fewer frames, a smaller model or a lower precision"
        missing = max(wanted - int(free), 0)
        return (
            f"the GPU is out of memory: {wanted / 1e6:.0f} MB are needed in one piece, {int(free) / 1e6:.0f} of {int(total) / 1e6:.0f} MB are free"
            f"{f', {missing / 1e6:.0f} MB are missing' if missing else ''}; use fewer frames, a smaller model or a lower precision"
        )

    def enter(self) -> None:
        """Make this thread work on the device."""
        self.call("cuCtxSetCurrent", self.context)

    # -- memory and copies -----------------------------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """Memory with nothing in it."""
        dtype = np.dtype(dtype)
        with self.work:
            self.enter()
            memory = self._block(max(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, 1))
        return Buffer(memory.address, tuple(shape), dtype, memory, self)

    def _block(self, size: int) -> _Memory:
        """One that was used before, else a new one; if there is no room, after giving all spare ones back."""
        while self._returned:
            known, address = self._returned.pop()
            self._spare.setdefault(known, []).append(address)
        if self._spare.get(size):
            return _Memory(self._returned, size, self._spare[size].pop())
        try:
            return _Memory(self._returned, size, int(self.call("cuMemAlloc", size)))
        except EngineError:
            if not any(self._spare.values()):
                raise
        for address in (address for addresses in self._spare.values() for address in addresses):
            self.call("cuMemFree", address)
        self._spare.clear()
        return _Memory(self._returned, size, int(self.call("cuMemAlloc", size)))

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """Memory full of zeros."""
        buffer = self.empty(shape, dtype)
        with self.work:
            self.call("cuMemsetD8Async", buffer.address, 0, max(buffer.nbytes, 1), self._stream)
        return buffer

    def upload(self, array: np.ndarray, into: Buffer | None = None, dtype: Any = None) -> Buffer:
        """A host array to the device, through pinned memory; returns before it has arrived. The array may be changed at once."""
        array = np.ascontiguousarray(array, dtype or (into.dtype if into is not None else array.dtype))
        into = into if into is not None else self.empty(array.shape, array.dtype)
        assert into.nbytes == array.nbytes, (into.shape, array.shape)
        if not array.nbytes:
            return into
        with self.work:
            self.enter()
            pinned = self._pinned_for(array.nbytes)
            ctypes.memmove(pinned.address, array.ctypes.data, array.nbytes)
            self.call("cuMemcpyHtoDAsync", into.address, pinned.address, array.nbytes, self._stream)
            pinned.used()
        return into

    def _pinned_for(self, size: int) -> _Pinned:
        """The pinned buffer that was used longest ago, free again."""
        if len(self._pinned) < PINNED_BUFFERS:
            self._pinned.append(_Pinned(self, size))
        else:
            self._pinned.append(self._pinned.pop(0))
        pinned = self._pinned[-1]
        pinned.wait(size)
        return pinned

    def download(self, buffer: Buffer) -> np.ndarray:
        """A device array to the host, when everything queued before is done."""
        array: np.ndarray = np.empty(buffer.shape, buffer.dtype)
        with self.work:
            self.enter()
            if array.nbytes:
                self.call("cuMemcpyDtoHAsync", array.ctypes.data, buffer.address, array.nbytes, self._stream)
            self.synchronize()
        return array

    def copy(self, source: Buffer, into: Buffer) -> None:
        """Device to device."""
        assert source.nbytes == into.nbytes
        if source.nbytes:
            with self.work:
                self.enter()
                self.call("cuMemcpyDtoDAsync", into.address, source.address, source.nbytes, self._stream)

    def synchronize(self) -> None:
        """Wait for everything that was queued."""
        with self.work:
            self.enter()
            self.call("cuStreamSynchronize", self._stream)

    # -- captured work ---------------------------------------------------------------------------------------------------------------------

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` queues, as a CUDA graph: the function that is returned queues all of it again, in one call."""
        with self.work:
            self.synchronize()
            self.call("cuStreamBeginCapture", self._stream, _capture_mode(self.driver))
            try:
                work()
            finally:
                graph = self.call("cuStreamEndCapture", self._stream)
            executable = self.call("cuGraphInstantiate", graph, 0)

        def launch() -> None:
            with self.work:
                self.enter()
                self.call("cuGraphLaunch", executable, self._stream)

        return launch


class _Pinned:
    """Host memory that the GPU copies from by itself."""

    def __init__(self, device: CudaDevice, size: int):
        self.device, self.size = device, size
        self.address = int(device.call("cuMemHostAlloc", size, 0))
        self.event, self.busy = device.call("cuEventCreate", 2), False

    def used(self) -> None:
        """A copy from it was queued."""
        self.device.call("cuEventRecord", self.event, self.device._stream)
        self.busy = True

    def wait(self, size: int) -> None:
        """Until that copy is done; grow if need be."""
        if self.busy:
            self.device.call("cuEventSynchronize", self.event)
            self.busy = False
        if size > self.size:
            self.device.call("cuMemFreeHost", self.address)
            self.address, self.size = int(self.device.call("cuMemHostAlloc", size, 0)), size


def _import_driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise EngineError(
            "running on a GPU needs cuda-core: pip install 'ppllava-edge[cuda]' (or [rtx], [tensorrt])"
        ) from None
    try:
        driver.cuInit(0)
    except Exception as error:  # the library of the driver itself isn't there
        raise EngineError(
            f"no NVIDIA driver was found on this machine ({' '.join(str(error).split())[:120]}); use --device cpu"
        ) from None
    return driver


def _status_name(driver: Any, status: Any) -> str:
    try:
        return str(driver.cuGetErrorString(status)[1].decode())
    except Exception:
        return str(status)


def _capture_mode(driver: Any) -> Any:
    return driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
