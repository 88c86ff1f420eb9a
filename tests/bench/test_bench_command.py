"""ppllava-bench, as a user types it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers.commands import ROOT, run_command


def test_bench(tmp_path: Path) -> None:
    run = run_command("ppllava-bench", "--runs", "2", "--warmup", "1", "--new-tokens", "4", "--json")
    found = json.loads(run.stdout)
    assert found["tokens_per_second"] > 0
    assert found["peak_memory_bytes"] > 1e6 and found["cold_start_seconds"] > 0
    assert {"trunk", "pooling", "prefill", "decode, a token", "first token, next ask"} <= set(found["stages"])
    assert found["stages"]["prefill"]["p50"] <= found["stages"]["prefill"]["p99"]
    pytest.importorskip("matplotlib", reason="the plot needs the extra `plot`")
    run = run_command(
        "ppllava-bench", "--runs", "1", "--warmup", "0", "--new-tokens", "2", "--plot", tmp_path / "bench.png"
    )
    assert run.returncode == 0 and os.listdir(tmp_path) == ["bench.png"] and "tokens/s" in run.stdout


def test_nano_names_the_packed_bundle_despite_a_folder_of_that_name() -> None:
    run = run_command(
        "ppllava-bench", "nano", "--runs", "1", "--warmup", "0", "--new-tokens", "2", "--json", cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["model"] == "nano"
