"""The pooling kernel: its arithmetic, in the header that GPU and host share, and its launcher."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.commands import GOLDEN
from helpers.pool_host import (
    BITS,
    FakeCudaCore,
    exact_gelu,
    from_bfloat,
    library,
    reference,
    run_host,
    to_bfloat,
)
from ppllava_edge.engines.bundle.windows import Windows
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.plugins.weighted_pool import kernel
from ppllava_edge.engines.plugins.weighted_pool.kernel import FOLDER, THREADS, Call, Launcher

POOLING = json.loads((GOLDEN / "functions" / "pooling.json").read_text())
ARRAYS = np.load(GOLDEN / "functions" / "pooling.npz")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return library(tmp_path_factory.mktemp("kernel"))


def as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    return to_bfloat(values) if dtype == "bfloat16" else values.astype(BITS[dtype])


def as_float(stored: np.ndarray, dtype: str) -> np.ndarray:
    return from_bfloat(stored) if dtype == "bfloat16" else stored.astype(np.float32)


def check(host: Any, call: Call, seed: int) -> None:
    """Compare the host build with float64 on random rows; the limit is the rounding of the result."""
    rng = np.random.default_rng(seed)
    hidden = as_stored(rng.standard_normal((*call.size, call.channels)).astype(np.float32) * 3, call.dtype)
    weights = rng.random(call.size).astype(np.float32)
    got = as_float(run_host(host, call, hidden, weights), call.dtype)
    want = reference(as_float(hidden, call.dtype), weights, call)
    rounding = {"float32": 2e-6, "float16": 2**-11, "bfloat16": 2**-8}[call.dtype]
    absolute = 1.8e-4 if call.gelu and call.dtype != "float32" else 2e-5
    np.testing.assert_array_less(np.abs(got - want), absolute + 1.1 * rounding * np.abs(want))


# As in test_functions, without the cases that are refused or have no array to compare.
CASES = [case for case in POOLING if "error" not in case and case["case"] not in (23, 26)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c["case"]))
def test_golden_cases(host: Any, case: dict[str, Any]) -> None:
    i = case["case"]
    inputs = ARRAYS[f"input_{i}"]
    weights = ARRAYS[f"weights_{i}"] if f"weights_{i}" in ARRAYS else np.ones(inputs[:, 0].shape, np.float32)
    windows = Windows(
        *(tuple(case[name]) if case[name] else None for name in ("kernel", "stride", "output_size"))
    )
    _, window, stride = windows.resolve((case["D"], case["H"], case["W"]))
    for n in range(len(inputs)):
        hidden = np.ascontiguousarray(inputs[n].transpose(1, 2, 3, 0), np.float32)
        call = Call(hidden.shape[:3], hidden.shape[3], window, stride, case["temperature"], "float32")
        got = run_host(host, call, hidden, np.ascontiguousarray(weights[n], np.float32))
        np.testing.assert_allclose(got, ARRAYS[f"output_{i}"][n].reshape(inputs.shape[1], -1).T, atol=2e-5)


@given(st.data())
def test_any_window_and_type(host: Any, data: st.DataObject) -> None:
    size = tuple(data.draw(st.integers(1, 6)) for _ in range(3))
    window = tuple(data.draw(st.integers(1, n)) for n in size)
    stride = tuple(data.draw(st.integers(1, 3)) for _ in range(3))
    channels = data.draw(st.sampled_from([1, 3, 4, 7, 8, 16, 24]))
    dtype = data.draw(st.sampled_from(list(BITS)))
    temperature = data.draw(st.sampled_from([0.01, 0.1, 1.0]))
    gelu = data.draw(st.booleans())
    aligned = data.draw(st.booleans())
    call = Call(size, channels, window, stride, temperature, dtype, gelu, aligned)  # type: ignore[arg-type]
    check(host, call, data.draw(st.integers(0, 2**32 - 1)))


def test_a_window_of_thousands_of_patches(host: Any) -> None:
    check(host, Call((9, 24, 24), 8, (8, 24, 24), (1, 24, 24), 0.1, "float16"), 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_value_is_read_and_written_unchanged(host: Any, dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = from_bfloat(bits) if dtype == "bfloat16" else bits.view(np.float16).astype(np.float32)
    bits = bits[np.isfinite(values)]
    hidden = bits.reshape(-1, 1, 1, 1) if dtype == "bfloat16" else bits.view(np.float16).reshape(-1, 1, 1, 1)
    call = Call((len(bits), 1, 1), 1, (1, 1, 1), (1, 1, 1), 1.0, dtype)
    got = run_host(host, call, hidden, np.zeros(hidden.shape[:3], np.float32)).view(np.uint16)[:, 0]
    both_zero = (bits & 0x7FFF == 0) & (got & 0x7FFF == 0)  # a sum that starts at 0 turns -0 into 0
    same = (got == bits) | both_zero
    assert same.all(), (bits[~same][:5], got[~same][:5])


def test_gelu_of_every_half(host: Any) -> None:
    """Within 1.7e-4 of the exact value, or the rounding of the result."""
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = x[np.abs(x) < 100]
    call = Call((len(x), 1, 1), 1, (1, 1, 1), (1, 1, 1), 1.0, "float16", gelu=True)
    weights = np.zeros((len(x), 1, 1), np.float32)
    got = run_host(host, call, x.reshape(-1, 1, 1, 1), weights)[:, 0].astype(np.float64)
    want = exact_gelu(x.astype(np.float64))
    assert (np.abs(got - want) <= 1.7e-4 + 2**-11 * np.abs(want)).all()


def test_nan_propagates(host: Any) -> None:
    call = Call((1, 2, 2), 1, (1, 2, 2), (1, 2, 2), 1.0, "float32")
    hidden, weights = np.ones((1, 2, 2, 1), np.float32), np.zeros((1, 2, 2), np.float32)
    hidden[0, 1, 1] = np.nan
    assert np.isnan(run_host(host, call, hidden, weights)).all()
    assert np.isnan(run_host(host, call, np.ones_like(hidden), weights + np.float32(np.nan))).all()


# -- launching -----------------------------------------------------------------------------------------------


@pytest.fixture
def launcher(host: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A launcher over a test double of cuda-core that runs the host build."""
    fake = FakeCudaCore(host)
    monkeypatch.setattr(kernel, "import_cuda_core", lambda: fake)
    kernel.compile_kernels.cache_clear()
    yield Launcher(), fake
    kernel.compile_kernels.cache_clear()


def test_launches_the_right_variant(launcher: Any) -> None:
    launch, fake = launcher
    rng = np.random.default_rng(0)
    for channels, dtype, name in (
        (1024, "float16", "f16"),
        (1024, "float32", "f32_gelu"),
        (20, "float16", "f16_single"),
    ):
        hidden = rng.standard_normal((4, 6, 6, channels)).astype(dtype)
        weights, out = rng.random((4, 6, 6)).astype(np.float32), np.full((8, channels), np.nan, dtype)
        got = launch.pool(hidden, weights, out, (2, 3, 3), (2, 3, 3), 0.1, gelu="gelu" in name)
        assert got is out
        call = Call((4, 6, 6), channels, (2, 3, 3), (2, 3, 3), 0.1, dtype, "gelu" in name)
        want = reference(hidden.astype(np.float32), weights, call)
        np.testing.assert_allclose(out, want, atol=5e-3 if dtype == "float16" else 1e-5)
        used, (grid, block) = fake.launches[-1]
        assert used == f"weighted_pool_{name}" and block == THREADS
        per_block = THREADS * call.lanes
        assert grid[0] == 8
        assert grid[1] * per_block >= channels > (grid[1] - 1) * per_block, "blocks cover every channel once"


def test_constants_agree_with_the_kernel() -> None:
    text = kernel.SOURCE.read_text()
    assert re.search(rf"kThreads = {THREADS};", text)
    assert kernel.source().count("#include") == 2, "the header is inlined; two includes of the host remain"


def test_arrays_that_do_not_fit_are_refused(launcher: Any) -> None:
    launch, _ = launcher
    hidden = np.zeros((2, 4, 4, 8), np.float16)
    weights = np.zeros((2, 4, 4), np.float32)
    out = np.zeros((4, 8), np.float16)
    for arguments, words in (
        ((hidden, weights, np.zeros((5, 8), np.float16)), "out is (5, 8)"),
        ((hidden, weights.astype(np.float64), out), "float64"),
        ((hidden[:, ::2], weights[:, ::2], out), "C-contiguous"),
        (("text", weights, out), "not a device array"),
        ((hidden.astype(np.int32), weights, out), "not int32"),
        ((hidden[0], weights, out), "takes hidden"),
    ):
        with pytest.raises(EngineError, match=re.escape(words)):
            launch.pool(*arguments, (2, 2, 2), (2, 2, 2))
    with pytest.raises(EngineError, match="don't fit"):
        launch.pool(hidden, weights, out, (3, 2, 2), (2, 2, 2))
    with pytest.raises(EngineError, match="temperature"):
        launch.pool(hidden, weights, out, (2, 2, 2), (2, 2, 2), temperature=0)


def test_old_cards_are_refused(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "import_cuda_core", lambda: FakeCudaCore(host, (7, 0)))
    kernel.compile_kernels.cache_clear()
    hidden, weights = np.zeros((1, 1, 1, 8), np.float16), np.zeros((1, 1, 1), np.float32)
    with pytest.raises(EngineError, match=r"7\.0 is too old.*7\.5"):
        Launcher().pool(hidden, weights, np.zeros((1, 8), np.float16), (1, 1, 1), (1, 1, 1))


def test_a_launcher_without_a_gpu_is_one_line() -> None:
    """One line, whether cuda-core or a device is missing."""
    try:
        Launcher()
    except EngineError as error:
        assert "cuda-core" in str(error) or "no usable CUDA device" in str(error)


# -- compiled for devices ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("nvcc"), reason="nvcc is not installed: the device build is not compiled here"
)
@pytest.mark.parametrize("capability", ["75", "87", "120"])
def test_device_build_spills_nothing(capability: str, tmp_path: Path) -> None:
    command = [
        "nvcc",
        "-std=c++17",
        "-cubin",
        f"-arch=sm_{capability}",
        "-Xptxas",
        "-v",
        str(FOLDER / "weighted_pool.cu"),
        "-o",
        str(tmp_path / "k.cubin"),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 12
