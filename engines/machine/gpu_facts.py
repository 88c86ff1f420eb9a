"""What GPUs are here, asked of the driver itself: no library beyond it is needed, and none is loaded."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_MAJOR, _MINOR, _INTEGRATED, _PROCESSORS, _CLOCK, _BUS = 75, 76, 18, 16, 36, 37  # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """One GPU. capability: "8.7". memory, free: bytes (free: None where nobody could say). integrated: shares the system's memory (Jetson)."""

    name: str
    capability: str
    memory: int
    free: int | None
    processors: int
    integrated: bool


def load_driver() -> Any:
    """The CUDA driver's library, started; None if there is no driver or no GPU that it runs."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        return driver if driver.cuInit(0) == 0 else None
    return None


def driver_version(driver: Any) -> str:
    """The newest CUDA that the driver runs: "13.0"."""
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def gpus(driver: Any = None) -> list[Gpu]:
    """All GPUs of this machine; [] without a driver."""
    driver = driver or load_driver()
    if driver is None:
        return []
    count, found = ctypes.c_int(), []
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    for ordinal in range(count.value):
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceGetName(name, 256, device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

        def ask(attribute: int, device: Any = device) -> int:
            value = ctypes.c_int()
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            return value.value

        capability = f"{ask(_MAJOR)}.{ask(_MINOR)}"
        found.append(
            Gpu(
                name.value.decode(errors="replace"),
                capability,
                memory.value,
                _free(driver, device),
                ask(_PROCESSORS),
                bool(ask(_INTEGRATED)),
            )
        )
    return found


def _free(driver: Any, device: Any) -> int | None:
    """Free memory of a device, through its primary context."""
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) != 0:
        return None
    try:
        driver.cuCtxPushCurrent_v2(context)
        good = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        return free.value if good else None
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)
