"""Statistics of activations, clipping ranges, and the store of intermediate values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppllava_edge.calibration.model.values import DiskValues
from ppllava_edge.calibration.statistics import InputStatistics, ranges
from ppllava_edge.engines.errors import PPLLaVAError


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_streamed_statistics_equal_those_of_all_data(lengths: list[int], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal((1, n, width)).astype(np.float32) for n in lengths]
    stats = InputStatistics("layer", len(parts))
    for part in parts:
        stats.add(part)
    everything = np.concatenate(parts, axis=1)[0]
    np.testing.assert_array_equal(stats.largest, np.abs(everything).max(axis=0))
    np.testing.assert_allclose(
        stats.mean_squares, np.square(everything, dtype=np.float64).mean(axis=0), rtol=1e-6
    )
    rows = {row.tobytes() for row in everything}
    assert len(stats.rows) and all(row.tobytes() in rows for row in stats.rows)


def test_activations_that_are_not_finite_name_the_layer() -> None:
    with pytest.raises(PPLLaVAError, match=r"blocks\.3.*not finite"):
        InputStatistics("blocks.3", 1).add(np.array([[1.0, np.nan]], np.float32))


def test_constant_activations_have_no_range() -> None:
    stats = InputStatistics("layer", 1)
    stats.add(np.zeros((4, 3), np.float32))
    assert stats.constant


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=30)
def test_every_range_lies_within_the_data(seed: int, size: float) -> None:
    x = np.abs(np.random.default_rng(seed).standard_normal(2000)) * size
    found = ranges(x, float(x.max()))
    assert {"max", "mse", "entropy", "percentile 99.9", "percentile 99.99"} == set(found)
    assert found["max"] == x.max() and all(0 < value <= x.max() * 1.001 for value in found.values())


def test_mse_cuts_a_tail_that_max_would_keep() -> None:
    x = np.abs(np.random.default_rng(0).standard_normal(100_000))
    x[0] = 200
    found = ranges(x, 200.0)
    assert found["mse"] < 180 and found["percentile 99.99"] < 10 < found["max"]


def test_stored_values_are_read_back_unchanged(tmp_path: Path) -> None:
    values = DiskValues(tmp_path / "v")
    for array in (
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.zeros((1, 0, 4), np.float32),
        np.array([5]),
        np.ones((2, 3), np.float16).T,
    ):
        values.put(1, "layers/x", array)
        got = values.get(1, "layers/x")
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)
    values.drop(1, "layers/x")
    assert not values.has(1, "layers/x")
