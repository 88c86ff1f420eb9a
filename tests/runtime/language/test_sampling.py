"""Choosing the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppllava_edge.engines.errors import EngineError, PromptError
from ppllava_edge.runtime import Pipeline
from ppllava_edge.runtime.language.sampling import Sampling, penalise, probabilities


@pytest.fixture(scope="module")
def pipeline(golden_bundle: Path) -> Pipeline:
    return Pipeline.open(golden_bundle)


def embeddings(pipeline: Pipeline, length: int) -> np.ndarray:
    shape = length, pipeline.manifest.decoder.hidden_size
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


logits_arrays = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40).map(
    lambda v: np.array(v, np.float32)
)


@given(logits_arrays, st.floats(0.05, 5), st.integers(0, 50), st.floats(0.01, 1))
def test_probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> None:
    p = probabilities(logits, temperature, top_k, top_p)
    assert np.isclose(p.sum(), 1) and (p >= 0).all()
    assert p[logits.argmax()] == p.max() > 0, "the likeliest token is never cut"
    if 0 < top_k < len(logits):
        assert (logits[p > 0] >= np.sort(logits)[-top_k]).all()
    if top_p < 1:
        full = probabilities(logits, temperature, top_k)
        kept = full[p > 0].sum()
        assert kept >= min(top_p, 1) - 1e-9
        assert kept - full[p > 0].min() < top_p + 1e-9, "no smaller set would do"


@given(logits_arrays, st.floats(1.01, 3), st.data())
def test_repetition_penalty_lowers_only_earlier_tokens(
    logits: np.ndarray, penalty: float, data: st.DataObject
) -> None:
    said = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, max_size=5))
    after = penalise(logits, said, penalty)
    rest = np.setdiff1d(np.arange(len(logits)), said)
    assert (after[said] <= logits[said]).all() and np.array_equal(after[rest], logits[rest])


def test_sampling_repeats_with_a_seed_and_greedy_is_argmax(pipeline: Pipeline) -> None:
    x = embeddings(pipeline, 9)
    hot = [
        list(pipeline.generate(x, 15, sampling=Sampling(temperature=1.5, seed=seed))) for seed in (1, 1, 2)
    ]
    assert hot[0] == hot[1] != hot[2]
    assert next(iter(pipeline.generate(x, 1))) == int(pipeline.prefill(x).argmax())
    assert list(pipeline.generate(x, 15, sampling=Sampling(temperature=1.5, top_k=1))) == list(
        pipeline.generate(x, 15)
    )


HUGE = 10**5000  # can't be written out: Python refuses such long numbers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1, -1e-9, "0.7", None, [1], HUGE, True, 1j, np.zeros(2))),
        *(("top_p", value) for value in (0, -0.1, 1.5, "1", None, HUGE)),
        *(("top_k", value) for value in (-1, 2.5, "3", None, -HUGE, True, float("nan"))),
        *(("repetition_penalty", value) for value in (0, -1, 1e-320, 1e300, "1", None)),
        *(("seed", value) for value in (-1, 1.5, "7", -HUGE, np.float32(1), True)),
        *((name, float("nan")) for name in ("temperature", "top_p", "repetition_penalty", "seed")),
        *((name, float("inf")) for name in ("temperature", "top_p", "repetition_penalty")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_impossible_sampling_is_refused(name: str, value: Any) -> None:
    with pytest.raises(PromptError, match=f"^{name} must be ") as found:
        Sampling(**{name: value})
    assert "\n" not in str(found.value) and len(str(found.value)) < 120


def test_numbers_of_numpy_are_accepted() -> None:
    sampling = Sampling(np.float32(0.5), np.float64(0.9), np.int64(3), np.float16(1.5), np.uint8(7))  # type: ignore[arg-type]
    assert sampling == Sampling(0.5, 0.9, 3, 1.5, 7) and type(sampling.top_k) is int


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 1e-320, 5e-324])
def test_a_very_low_temperature_takes_the_likeliest_token(temperature: float) -> None:
    logits = np.array([1, 30, -30, 29], np.float32)
    assert probabilities(logits, temperature).tolist() == [0, 1, 0, 0]
    assert Sampling(temperature=temperature).sampler()(logits, []) == 1
    assert probabilities(logits, temperature, 2, 0.5).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_no_numbers(wrong: float) -> None:
    logits = np.array([1, wrong, 2], np.float32)
    with pytest.raises(EngineError, match="logits that are no numbers"):
        Sampling(temperature=1.0).sampler()(logits, [])
    if np.isnan(wrong):  # greedy answers too: the cache that computed them must not serve the next one
        with pytest.raises(EngineError, match="logits that are no numbers"):
            Sampling().sampler()(logits, [])
