"""The GPUs of this machine, from the CUDA driver itself: no other library is needed or loaded."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

# CUdevice_attribute
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76
_INTEGRATED = 18
_MULTIPROCESSORS = 16


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: Its product name.
        capability: Its compute capability, like "8.7".
        memory: Total memory, bytes.
        free: Free memory, bytes; None if unknown.
        processors: Number of streaming multiprocessors.
        integrated: Whether it shares the system's memory, as on a Jetson.
    """

    name: str
    capability: str
    memory: int
    free: int | None
    processors: int
    integrated: bool


def load_driver() -> Any:
    """Load and initialise the CUDA driver's library; None without a driver or a GPU that it supports."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        return driver if driver.cuInit(0) == 0 else None
    return None


def driver_version(driver: Any) -> str:
    """The newest CUDA version that the driver supports, like "13.0"."""
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def gpus(driver: Any = None) -> list[Gpu]:
    """All GPUs of this machine; [] without a driver.

    Args:
        driver: The driver's library; None loads it.
    """
    driver = driver or load_driver()
    count = ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    return [_describe(driver, ordinal) for ordinal in range(count.value)]


def _describe(driver: Any, ordinal: int) -> Gpu:
    device = ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    memory = ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    driver.cuDeviceGetName(name, 256, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    major = _attribute(driver, device, _CAPABILITY_MAJOR)
    minor = _attribute(driver, device, _CAPABILITY_MINOR)
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=f"{major}.{minor}",
        memory=memory.value,
        free=_free_memory(driver, device),
        processors=_attribute(driver, device, _MULTIPROCESSORS),
        integrated=bool(_attribute(driver, device, _INTEGRATED)),
    )


def _attribute(driver: Any, device: ctypes.c_int, attribute: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value


def _free_memory(driver: Any, device: ctypes.c_int) -> int | None:
    """Free memory of a device in bytes, asked in its primary context."""
    context = ctypes.c_void_p()
    free = ctypes.c_size_t()
    total = ctypes.c_size_t()
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) != 0:
        return None
    try:
        driver.cuCtxPushCurrent_v2(context)
        status = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        return free.value if status == 0 else None
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)
