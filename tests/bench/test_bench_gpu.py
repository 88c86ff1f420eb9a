"""bench/gpu.py as far as it runs without a GPU: the compile table, the kernel checks over the host build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import ROOT
from helpers.pool_host import FakeCudaCore, library
from ppllava_edge.bench.gpu_report import kernel as checks
from ppllava_edge.engines.plugins.weighted_pool import kernel

RUN_WITHOUT_INSTALLATION = """
import runpy, sys
script, *arguments = sys.argv[1:]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path[:] = [path for path in sys.path if "ppllava" not in path]
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run bench/gpu.py in a Python that doesn't find an installed ppllava_edge."""
    command = [sys.executable, "-c", RUN_WITHOUT_INSTALLATION, str(ROOT / "bench" / "gpu.py"), *arguments]
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


def test_help(tmp_path: Path) -> None:
    run = run_script(tmp_path, "--help")
    assert run.returncode == 0, run.stderr
    assert "{kernel,answer,compile}" in run.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("nvcc"), reason="nvcc is not installed: the device build is not compiled here"
)
def test_compile_table_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    run = run_script(tmp_path, "compile", "--targets", "75,87,120", "--json", str(table))
    assert run.returncode == 0, run.stderr
    rows = json.loads(table.read_text())
    assert len(rows) == 3 * (12 + 4)
    assert not any(row["spills"] for row in rows)
    assert all(8 <= row["registers"] <= 64 for row in rows)
    assert "sm_87" in run.stdout
    assert "bf16_gelu" in run.stdout


class TorchView:
    """A torch tensor on the host, as cuda-core's StridedMemoryView shows one on the device."""

    def __init__(self, tensor: Any):
        self.ptr = tensor.data_ptr()
        self.shape = tuple(tensor.shape)
        self.strides = tuple(tensor.stride())
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.is_device_accessible = True

    @classmethod
    def from_any_interface(cls, tensor: Any, stream_ptr: int) -> Any:
        return cls(tensor)


def test_the_checks_accept_the_kernel_and_refuse_a_wrong_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip(
        "torch", reason="torch is not installed: the script's checks are not run here"
    )
    fake = FakeCudaCore(library(tmp_path))
    fake.utils = type("utils", (), {"StridedMemoryView": TorchView})
    monkeypatch.setattr(kernel, "import_cuda_core", lambda: fake)
    monkeypatch.setattr(checks, "CASES", 40)
    kernel.compile_kernels.cache_clear()
    launcher = kernel.Launcher()
    assert 0 < checks.kernel_checks(torch, launcher, "cpu")["worst_share_of_allowed_error"] < 1
    monkeypatch.setattr(fake, "launch", lambda *arguments: None)  # writes nothing
    with pytest.raises(SystemExit, match="times what rounding allows"):
        checks.kernel_checks(torch, launcher, "cpu")
    kernel.compile_kernels.cache_clear()
