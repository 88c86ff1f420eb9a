"""GPU memory: typed buffers, recycled blocks, and pinned host memory for uploads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import EngineError

MAX_SPARE = 512 << 20  # bytes of unused blocks


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

    def __init__(self, pool: BlockPool, size: int, address: int):
        self._pool = pool
        self._size = size
        self.address = address

    def __del__(self) -> None:
        self._pool.give_back(self._size, self.address)


class BlockPool:
    """Recycles device memory by block size.

    All work runs on one stream, in order, so a block can be reused as soon as nothing refers to it. Freeing
    it instead would wait for the GPU, and isn't allowed during a capture.

    Args:
        allocate: Allocates a number of bytes and returns the address; raises EngineError if memory runs out.
        free: Frees an address.
        max_spare: Bytes of unused blocks at which they are freed before a new one is allocated.
    """

    def __init__(
        self, allocate: Callable[[int], int], free: Callable[[int], Any], max_spare: int = MAX_SPARE
    ):
        self._allocate = allocate
        self._free = free
        self._max_spare = max_spare
        self._is_closed = False
        self._returned: list[tuple[int, int]] = []  # (size, address); any thread may append to it
        self._spare: dict[int, list[int]] = {}  # size → addresses of unused blocks

    def take(self, size: int) -> Block:
        """A block of `size` bytes, spare or new. If memory runs out, all spare blocks are freed first.

        Raises:
            EngineError: Out of GPU memory.
        """
        self._collect()
        with contextlib.suppress(KeyError, IndexError):  # IndexError: a destructor freed them, after `close`
            return Block(self, size, self._spare[size].pop())
        spare = sum(known * len(addresses) for known, addresses in self._spare.items())
        if spare > self._max_spare:
            self._free_spare()
        try:
            return Block(self, size, self._allocate(size))
        except EngineError:
            if not any(self._spare.values()):
                raise
        self._free_spare()
        return Block(self, size, self._allocate(size))

    def give_back(self, size: int, address: int) -> None:
        """Take a block's memory back, in any thread, also in a destructor."""
        self._returned.append((size, address))
        if self._is_closed:
            with contextlib.suppress(EngineError):
                self.free_all()

    def close(self) -> None:
        """Free all unused blocks, and from now on each block as soon as nothing refers to it."""
        self._is_closed = True
        self.free_all()

    def free_all(self) -> None:
        """Free all unused blocks."""
        self._collect()
        self._free_spare()

    def _collect(self) -> None:
        while self._returned:
            try:
                size, address = self._returned.pop()
            except IndexError:  # another thread took it
                return
            self._spare.setdefault(size, []).append(address)

    def _free_spare(self) -> None:
        while self._spare:
            _, addresses = self._spare.popitem()
            while addresses:
                self._free(addresses.pop())


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

    def close(self) -> None:
        """Free it, after the last copy."""
        if self._busy:
            self._device.call("cuEventSynchronize", self._event)
        self._device.call("cuMemFreeHost", self.address)
        self._device.call("cuEventDestroy", self._event)

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
