"""GPU memory: typed buffers, recycled blocks, and pinned host memory for uploads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import EngineError


@dataclass(frozen=True)
class Buffer:
    """A C-contiguous array in device memory. np.asarray(buffer) waits for the GPU and copies it to the host.

    Attributes:
        address: Device address of the first value.
        shape: Its shape.
        dtype: Its NumPy dtype.
        owner: Keeps the memory alive.
        device: The CudaDevice it belongs to.
    """

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
        """A view of `count` rows along the first axis."""
        row_bytes = self.nbytes // self.shape[0] if self.shape[0] else 0
        return replace(self, address=self.address + first * row_bytes, shape=(count, *self.shape[1:]))

    def reshape(self, *shape: int) -> Buffer:
        """A view with another shape."""
        assert int(np.prod(shape, dtype=np.int64)) == int(np.prod(self.shape, dtype=np.int64))
        return replace(self, shape=shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array: np.ndarray = self.device.download(self)
        return array if dtype is None else array.astype(dtype)


Values = dict[str, Buffer | np.ndarray]  # a stage's inputs by name; host arrays are small integers


class Block:
    """A block of device memory. It returns to its pool when nothing refers to it any more."""

    def __init__(self, returned: list[tuple[int, int]], size: int, address: int):
        self._returned = returned
        self._size = size
        self.address = address

    def __del__(self) -> None:
        self._returned.append((self._size, self.address))


class BlockPool:
    """Recycles device memory by block size.

    All work runs on one stream, in order, so a block can be reused as soon as nothing refers to it. Freeing
    it instead would wait for the GPU, and isn't allowed during a capture.

    Args:
        allocate: Allocates a number of bytes and returns the address; raises EngineError if memory runs out.
        free: Frees an address.
    """

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], Any]):
        self._allocate = allocate
        self._free = free
        self._returned: list[tuple[int, int]] = []  # (size, address); any thread may append to it
        self._spare: dict[int, list[int]] = {}  # size → addresses of unused blocks

    def take(self, size: int) -> Block:
        """A block of `size` bytes, spare or new. If memory runs out, all spare blocks are freed first.

        Raises:
            EngineError: Out of GPU memory.
        """
        while self._returned:
            known, address = self._returned.pop()
            self._spare.setdefault(known, []).append(address)
        if self._spare.get(size):
            return Block(self._returned, size, self._spare[size].pop())
        try:
            return Block(self._returned, size, self._allocate(size))
        except EngineError:
            if not any(self._spare.values()):
                raise
        for addresses in self._spare.values():
            for address in addresses:
                self._free(address)
        self._spare.clear()
        return Block(self._returned, size, self._allocate(size))


class PinnedBuffer:
    """Page-locked host memory, from which the GPU copies asynchronously.

    Args:
        device: The CudaDevice that copies from it.
        size: Bytes.
    """

    def __init__(self, device: Any, size: int):
        self._device = device
        self._size = size
        self._event = device.call("cuEventCreate", 2)  # CU_EVENT_DISABLE_TIMING
        self._busy = False
        self.address = int(device.call("cuMemHostAlloc", size, 0))

    def mark_used(self) -> None:
        """Record that a copy from this buffer was queued."""
        self._device.call("cuEventRecord", self._event, self._device.stream_handle)
        self._busy = True

    def wait(self, size: int) -> None:
        """Block until the last copy is done, and grow to `size` bytes if necessary."""
        if self._busy:
            self._device.call("cuEventSynchronize", self._event)
            self._busy = False
        if size > self._size:
            self._device.call("cuMemFreeHost", self.address)
            self.address = int(self._device.call("cuMemHostAlloc", size, 0))
            self._size = size
