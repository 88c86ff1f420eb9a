"""An inventory of this machine: memory, GPUs, JetPack and installed packages. No GPU library is loaded."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ppllava_edge.engines.machine.gpu_facts import Gpu, driver_version, gpus, load_driver
from ppllava_edge.engines.machine.memory import system_memory

PACKAGES = (
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-core",
    "av",
    "tokenizers",
)
PAGE_BYTES = 4096
ROOT = Path("/")


@dataclass(frozen=True)
class Machine:
    """Facts about a machine.

    Attributes:
        system: Operating system, its release and the architecture.
        python: Python's version.
        cores: Number of CPU cores.
        memory: Total memory, bytes; None if unknown.
        available: Memory that can be allocated now, bytes; None if unknown.
        free_blocks: How many of the largest free blocks of physical memory there are, and their bytes (lfb in
            tegrastats). With few of them, a Jetson can't give the GPU much memory in one piece.
        gpus: The GPUs that the driver sees.
        cuda: The newest CUDA version that the driver supports.
        driver: Version of the NVIDIA kernel driver.
        jetpack: JetPack and L4T version of a Jetson.
        power_mode: Power mode of a Jetson.
        packages: Installed packages of PACKAGES → version.
    """

    system: str
    python: str
    cores: int
    memory: int | None
    available: int | None
    free_blocks: tuple[int, int] | None
    gpus: list[Gpu]
    cuda: str | None
    driver: str | None
    jetpack: str | None
    power_mode: str | None
    packages: dict[str, str]


def inspect_machine(root: Path = ROOT) -> Machine:
    """Collect the facts about this machine.

    Args:
        root: Root of the file system (for tests).
    """
    driver = load_driver()
    memory = system_memory(root)
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        python=platform.python_version(),
        cores=os.cpu_count() or 1,
        memory=memory.get("MemTotal"),
        available=memory.get("MemAvailable"),
        free_blocks=_free_blocks(root),
        gpus=gpus(driver),
        cuda=driver_version(driver) if driver is not None else None,
        driver=_kernel_driver(root),
        jetpack=_jetpack(root),
        power_mode=_power_mode(),
        packages=_installed_packages(),
    )


def _installed_packages() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _free_blocks(root: Path) -> tuple[int, int] | None:
    """Number and bytes of the largest free blocks; Linux's buddy allocator counts blocks of 2^n pages."""
    totals: dict[int, int] = {}
    for line in _read(root / "proc/buddyinfo").splitlines():
        counts = re.findall(r"\s(\d+)", line.partition("zone")[2])
        for order, count in enumerate(counts):
            totals[order] = totals.get(order, 0) + int(count)
    largest = max((order for order, total in totals.items() if total), default=None)
    return None if largest is None else (totals[largest], PAGE_BYTES << largest)


def _kernel_driver(root: Path) -> str | None:
    found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", _read(root / "proc/driver/nvidia/version"))
    return found[1] if found else None


def _jetpack(root: Path) -> str | None:
    """Versions like "6.2 (L4T 36.4.3)" on a Jetson, None elsewhere."""
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release"))
    package = re.search(
        r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: ([\d.]+)", _read(root / "var/lib/dpkg/status"), re.M
    )
    l4t = f"L4T {release[1]}.{release[2]}" if release else None
    if package is None:
        return l4t
    return f"{package[1]} ({l4t})" if l4t else package[1]


def _power_mode() -> str | None:
    """A Jetson's power mode, from nvpmodel."""
    command = shutil.which("nvpmodel")
    if command is None:
        return None
    try:
        run = subprocess.run([command, "-q"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"Power Mode:\s*(\S+)", run.stdout)
    return found[1] if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
