"""One GPU through the CUDA driver API: memory, copies and CUDA graphs.

All work is queued on one stream, in order; only download() and synchronize() wait for it. Several threads
may queue work: each holds the device's lock while it does, and while it captures, so that no other thread's
work gets into its graph. Tests replace the driver with a double.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.device_memory import BlockPool, Buffer, PinnedBuffer
from ppllava_edge.engines.errors import EngineError

PINNED_BUFFERS = 2  # concurrent uploads: frames are copied while the next ones are decoded
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: doesn't wait for the default stream
LESS_MEMORY = "use fewer frames, a smaller model or a lower precision"


class CudaDevice:
    """The first GPU (CUDA_VISIBLE_DEVICES chooses).

    Attributes:
        driver: The driver module, cuda.bindings.driver or a double.
        lock: Held by the thread that queues work.
        context: The device's primary context.
        stream_handle: The stream on which everything runs, as the driver's object.
        stream: The stream's address.

    Args:
        driver: The driver module; None imports cuda.bindings.driver.

    Raises:
        EngineError: No driver or no GPU was found.
    """

    def __init__(self, driver: Any = None):
        self.driver = driver or _import_driver()
        self.lock = threading.RLock()
        self.call("cuInit", 0)
        if not self.call("cuDeviceGetCount"):
            raise EngineError("no NVIDIA GPU was found; ppllava-doctor says what is missing")
        ordinal = self.call("cuDeviceGet", 0)
        self.context = self.call("cuDevicePrimaryCtxRetain", ordinal)
        self.call("cuCtxSetCurrent", self.context)
        self.stream_handle = self.call("cuStreamCreate", NON_BLOCKING)
        self.stream = int(self.stream_handle)
        self._pinned: list[PinnedBuffer] = []
        self._pool = BlockPool(
            allocate=lambda size: int(self.call("cuMemAlloc", size)),
            free=self._free,
        )
        self._unused_graphs: list[Any] = []  # any thread may append to it

    def _free(self, address: int) -> None:
        self.enter()  # a destructor may come here in any thread
        self.call("cuMemFree", address)

    def close(self) -> None:
        """Free all unused memory now, and what is still in use as soon as nothing refers to it."""
        with self.lock:
            self.enter()
            self._destroy_unused_graphs()
            self._pool.close()
            while self._pinned:
                self._pinned.pop().close()

    def __del__(self) -> None:
        # At exit the driver may be gone; before the constructor has ended, there is nothing to free.
        with contextlib.suppress(Exception):
            self.close()
            self.call("cuStreamDestroy", self.stream_handle)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a driver function.

        Returns:
            Its result; a list if it has several.

        Raises:
            EngineError: The call failed; for an allocation it says how much memory was missing.
        """
        status, *results = getattr(self.driver, name)(*arguments)
        if int(status) == OUT_OF_MEMORY:
            allocates = name in ("cuMemAlloc", "cuMemHostAlloc")
            raise EngineError(self._out_of_memory(int(arguments[0]) if allocates else 0))
        if int(status):
            reason = _status_name(self.driver, status)
            raise EngineError(f"{name} failed: {reason}; ppllava-doctor says what is missing")
        return results[0] if len(results) == 1 else results

    def enter(self) -> None:
        """Make the device's context current in this thread."""
        self.call("cuCtxSetCurrent", self.context)

    def _out_of_memory(self, requested: int) -> str:
        """The error message for a failed allocation of `requested` bytes (0: unknown)."""
        status, free, total = self.driver.cuMemGetInfo()
        if int(status) or not requested:
            return f"the GPU is out of memory; {LESS_MEMORY}"
        missing = max(requested - int(free), 0) / 1e6
        return (
            f"the GPU is out of memory: {requested / 1e6:.0f} MB are needed in one piece, "
            f"{int(free) / 1e6:.0f} of {int(total) / 1e6:.0f} MB are free"
            f"{f', {missing:.0f} MB are missing' if missing else ''}; {LESS_MEMORY}"
        )

    # -- memory and copies ---------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """An uninitialised buffer."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with self.lock:
            self.enter()
            block = self._pool.take(max(size, 1))
        return Buffer(block.address, tuple(shape), dtype, block, self)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """A buffer filled with zeros."""
        buffer = self.empty(shape, dtype)
        with self.lock:
            self.call("cuMemsetD8Async", buffer.address, 0, max(buffer.nbytes, 1), self.stream_handle)
        return buffer

    def upload(self, array: np.ndarray, into: Buffer | None = None, dtype: Any = None) -> Buffer:
        """Queue a copy from the host to the device, through pinned memory.

        Args:
            array: The host array; it may be changed as soon as this returns.
            into: The buffer to fill; None allocates one.
            dtype: Convert to this dtype first. Default: the buffer's, or the array's.

        Returns:
            The buffer. Work queued later sees its contents.
        """
        array = np.ascontiguousarray(array, dtype or (into.dtype if into is not None else array.dtype))
        into = into if into is not None else self.empty(array.shape, array.dtype)
        assert into.nbytes == array.nbytes, (into.shape, array.shape)
        if not array.nbytes:
            return into
        with self.lock:
            self.enter()
            pinned = self._free_pinned_buffer(array.nbytes)
            ctypes.memmove(pinned.address, array.ctypes.data, array.nbytes)
            self.call("cuMemcpyHtoDAsync", into.address, pinned.address, array.nbytes, self.stream_handle)
            pinned.mark_used()
        return into

    def download(self, buffer: Buffer) -> np.ndarray:
        """Copy a buffer to the host, after all work queued before."""
        array: np.ndarray = np.empty(buffer.shape, buffer.dtype)
        with self.lock:
            self.enter()
            if array.nbytes:
                self.call(
                    "cuMemcpyDtoHAsync", array.ctypes.data, buffer.address, array.nbytes, self.stream_handle
                )
            self.synchronize()
        return array

    def copy(self, source: Buffer, into: Buffer) -> None:
        """Queue a copy from one buffer to another."""
        assert source.nbytes == into.nbytes
        if source.nbytes:
            with self.lock:
                self.enter()
                self.call(
                    "cuMemcpyDtoDAsync", into.address, source.address, source.nbytes, self.stream_handle
                )

    def synchronize(self) -> None:
        """Block until all queued work completes."""
        with self.lock:
            self.enter()
            self.call("cuStreamSynchronize", self.stream_handle)

    def _free_pinned_buffer(self, size: int) -> PinnedBuffer:
        """The least recently used pinned buffer, after its last copy is done."""
        if len(self._pinned) < PINNED_BUFFERS:
            self._pinned.append(PinnedBuffer(self, size))
        else:
            self._pinned.append(self._pinned.pop(0))
        pinned = self._pinned[-1]
        pinned.wait(size)
        return pinned

    # -- CUDA graphs ---------------------------------------------------------------

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        """Capture the work that a function queues as a CUDA graph.

        Args:
            queue: Queues the work. It isn't executed.

        Returns:
            A function that queues the whole graph in one call.
        """
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with self.lock:
            self._destroy_unused_graphs()
            self.synchronize()
            self.call("cuStreamBeginCapture", self.stream_handle, mode)
            try:
                queue()
            finally:
                graph = self.call("cuStreamEndCapture", self.stream_handle)
            executable = self.call("cuGraphInstantiate", graph, 0)
            self.call("cuGraphDestroy", graph)
        return _CapturedGraph(self, executable)

    def launch(self, executable: Any) -> None:
        """Queue an executable graph."""
        with self.lock:
            self.enter()
            self.call("cuGraphLaunch", executable, self.stream_handle)

    def drop_graph(self, executable: Any) -> None:
        """Destroy an executable graph before the next capture. Safe in a destructor, in any thread."""
        self._unused_graphs.append(executable)

    def _destroy_unused_graphs(self) -> None:
        while self._unused_graphs:
            self.call("cuGraphExecDestroy", self._unused_graphs.pop())


class _CapturedGraph:
    """A captured graph: calling it queues the graph's work."""

    def __init__(self, device: CudaDevice, executable: Any):
        self._device, self._executable = device, executable

    def __call__(self) -> None:
        self._device.launch(self._executable)

    def __del__(self) -> None:
        self._device.drop_graph(self._executable)


def _import_driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise EngineError(
            "running on a GPU needs cuda-core: pip install 'ppllava-edge[cuda]' (or [rtx], [tensorrt])"
        ) from None
    try:
        driver.cuInit(0)
    except Exception as error:  # cuda-core is installed, but the driver's library is not
        reason = " ".join(str(error).split())[:120]
        raise EngineError(f"no NVIDIA driver was found on this machine ({reason}); use device=cpu") from None
    return driver


def _status_name(driver: Any, status: Any) -> str:
    try:
        return str(driver.cuGetErrorString(status)[1].decode())
    except Exception:
        return str(status)
