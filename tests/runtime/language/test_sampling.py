"""Choosing the next token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppllava_edge.engines.errors import PromptError
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


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"temperature": float("nan")},
    ],
)
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PromptError):
        Sampling(**wrong)  # type: ignore[arg-type]
