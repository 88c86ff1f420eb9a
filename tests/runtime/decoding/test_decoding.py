"""The decoder's loop and its cache: invariants that hold for any model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppllava_edge.engines.errors import EngineError, PromptError
from ppllava_edge.runtime import Pipeline
from ppllava_edge.runtime.decoding.capacity import CAPACITY_STEP


@pytest.fixture(scope="module")
def pipeline(golden_bundle: Path) -> Pipeline:
    return Pipeline.open(golden_bundle)


def embeddings(pipeline: Pipeline, length: int, seed: int = 0) -> np.ndarray:
    return (
        np.random.default_rng(seed)
        .standard_normal((length, pipeline.manifest.decoder.hidden_size))
        .astype(np.float32)
    )


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_feeding_in_pieces_equals_feeding_at_once(pipeline: Pipeline, pieces: list[int]) -> None:
    x = embeddings(pipeline, sum(pieces))
    want, sequence, at = pipeline.prefill(x), pipeline.decoder.start(len(x), 1), 0
    for count in pieces:
        sequence.feed(x[at : at + count])
        got = sequence.logits()[-1]
        at += count
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert sequence.cache.length == len(x)


def test_the_cache_is_written_in_place_and_only_where_it_should_be(golden_bundle: Path) -> None:
    pipeline = Pipeline.open(golden_bundle)  # with a cache that nothing has used
    sequence = pipeline.decoder.start(12, 8)
    cache = sequence.cache
    addresses = {name: buffer.data_ptr() for name, buffer in cache.buffers.items()}
    sequence.feed(embeddings(pipeline, 12))
    before = {name: buffer.numpy().copy() for name, buffer in cache.buffers.items()}
    assert all(np.abs(a[:, :, 12:]).max() == 0 for a in before.values()), (
        "positions after the prompt were touched"
    )
    sequence.feed(embeddings(pipeline, 1, seed=1))
    for name, buffer in cache.buffers.items():
        after = buffer.numpy()
        assert buffer.data_ptr() == addresses[name], "a buffer moved"
        assert np.array_equal(after[:, :, :12], before[name][:, :, :12]), "the past was rewritten"
        assert np.abs(after[:, :, 12]).max() > 0 and np.abs(after[:, :, 13:]).max() == 0
    assert cache.length == 13 and cache.bytes == sum(
        buffer.numpy().nbytes for buffer in cache.buffers.values()
    )


def test_capacity_fits_the_generation(pipeline: Pipeline) -> None:
    decoder, context = pipeline.decoder, pipeline.manifest.decoder.context
    assert decoder.start(10, 20).cache.capacity == CAPACITY_STEP
    assert decoder.start(CAPACITY_STEP, 1).cache.capacity == 2 * CAPACITY_STEP
    assert decoder.start(10, 10**9).cache.capacity == context


def test_a_finished_sequence_leaves_its_cache_and_a_running_one_keeps_it(pipeline: Pipeline) -> None:
    decoder = pipeline.decoder
    first, second = decoder.start(10, 20), decoder.start(10, 20)
    assert first.cache is not second.cache
    decoder.finish(first)
    assert decoder.start(50, 60).cache is first.cache


def test_sequences_under_way_at_once_do_not_disturb_each_other(pipeline: Pipeline) -> None:
    prompts = [embeddings(pipeline, 9, seed=s) for s in range(3)]
    want = [list(pipeline.generate(x, 10)) for x in prompts]
    running = [pipeline.generate(x, 10) for x in prompts]
    got = [[next(r) for r in running] for _ in range(10)]
    assert [list(ids) for ids in zip(*got)] == want


def test_a_used_cache_does_not_leak_into_the_next_answer(pipeline: Pipeline) -> None:
    x = embeddings(pipeline, 9)
    fresh = list(pipeline.generate(x, 12))
    list(pipeline.generate(embeddings(pipeline, 200, seed=3), 30))
    assert list(pipeline.generate(x, 12)) == fresh


def test_too_long_a_prompt_says_by_how_many_tokens(pipeline: Pipeline) -> None:
    context = pipeline.manifest.decoder.context
    with pytest.raises(PromptError, match=f"{context + 4} tokens, 5 too many"):
        pipeline.prefill(np.zeros((context + 4, pipeline.manifest.decoder.hidden_size), np.float32))


def test_generation_ends_with_the_context(pipeline: Pipeline) -> None:
    context = pipeline.manifest.decoder.context
    x = embeddings(pipeline, context - 3)
    assert (
        len(list(pipeline.generate(x, 100))) == 4
    )  # one from the prompt's logits, three that fit into the cache


def test_overfilling_the_cache_is_refused(pipeline: Pipeline) -> None:
    sequence = pipeline.decoder.start(1, 1)
    with pytest.raises(EngineError, match="don't fit"):
        sequence.feed(embeddings(pipeline, CAPACITY_STEP + 1))
    assert sequence.cache.length == 0


def test_a_stop_id_is_yielded_and_ends_it(pipeline: Pipeline) -> None:
    x = embeddings(pipeline, 7)
    ids = list(pipeline.generate(x, 10))
    stop = ids[4]
    assert list(pipeline.generate(x, 10, stop_ids=(stop,))) == ids[: ids.index(stop) + 1]
    assert list(pipeline.generate(x, 0)) == []
