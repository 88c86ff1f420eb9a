"""bench/gpu.py, as far as it runs without a GPU: the compile table, and the kernel's checks over the host build."""

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
from ppllava_edge.bench import gpu
from ppllava_edge.engines.plugins.weighted_pool import kernel


@pytest.mark.skipif(
    not shutil.which("nvcc"), reason="nvcc is not installed: the device build is not compiled here"
)
def test_compile_table_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    code = f"import sys, runpy; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; sys.path[:] = [p for p in sys.path if 'ppllava' not in p]; sys.argv = ['gpu.py', 'compile', '--targets', '75,87,120', '--json', {str(tmp_path / 't.json')!r}]; runpy.run_path({str(ROOT / 'bench' / 'gpu.py')!r}, run_name='__main__')"  # noqa: E501
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "160"},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "t.json").read_text())
    assert (
        len(rows) == 3 * (12 + 4)
        and not any(row["spills"] for row in rows)
        and all(8 <= row["registers"] <= 64 for row in rows)
    )
    assert "sm_87" in run.stdout and "bf16_gelu" in run.stdout


def test_the_checks_accept_the_kernel_and_refuse_a_wrong_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip(
        "torch", reason="torch is not installed: the script's checks are not run here"
    )
    fake = FakeCudaCore(library(tmp_path))

    class View:
        def __init__(self, tensor: Any):
            self.ptr, self.shape, self.strides = (
                tensor.data_ptr(),
                tuple(tensor.shape),
                tuple(tensor.stride()),
            )
            self.dtype, self.is_device_accessible = str(tensor.dtype).removeprefix("torch."), True

        @classmethod
        def from_any_interface(cls, tensor: Any, stream_ptr: int) -> Any:
            return cls(tensor)

    fake.utils = type("utils", (), {"StridedMemoryView": View})
    monkeypatch.setattr(kernel, "import_cuda_core", lambda: fake)
    monkeypatch.setattr(gpu, "CASES", 40)
    kernel.compile_kernels.cache_clear()
    launcher = kernel.Launcher()
    assert 0 < gpu.kernel_checks(torch, launcher, "cpu")["worst_share_of_allowed_error"] < 1
    monkeypatch.setattr(fake, "launch", lambda *arguments: None)  # writes nothing
    with pytest.raises(SystemExit, match="times what rounding allows"):
        gpu.kernel_checks(torch, launcher, "cpu")
    kernel.compile_kernels.cache_clear()
