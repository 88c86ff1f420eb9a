"""Programs that need the extra `export` say so in one line where it isn't installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT_ONNX = """
import runpy, sys
sys.modules["onnx"] = None
sys.argv = [sys.argv[1]]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", ["fuzz", "crash_points"])
def test_without_onnx_the_error_names_the_extra(program: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_ONNX, f"ppllava_edge.bench.{program}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert "pip install 'ppllava-edge[cpu,export]'" in run.stderr
