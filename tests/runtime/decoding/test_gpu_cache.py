"""Data that stays on the GPU while an answer is generated, copies to the host, and allocations."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.commands import SAMPLE
from helpers.gpu_engine import QUESTIONS, TARGETS, Opened, asking, open_double
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import PromptError
from ppllava_edge.runtime import Pipeline
from ppllava_edge.runtime.language.prompt_lookup import PromptLookup
from ppllava_edge.runtime.language.sampling import Sampling


def test_only_token_ids_are_copied_to_the_host(opened: Callable[..., Opened], want: list[str]) -> None:
    """The one further copy, after the last token: the weights of 8 frames of 9x9 patches, for the moments."""
    pipeline, driver, _ = opened("orin")
    video = asking(pipeline).open(SAMPLE)
    answer = video.ask(QUESTIONS[1])
    assert answer.text == want[1] and driver.to_host == [8] * answer.new_tokens + [4 * 8 * 81]


def test_a_step_is_captured_once_and_launched_again(opened: Callable[..., Opened], want: list[str]) -> None:
    pipeline, driver, trt = opened("orin", piece_bytes=200_000)
    video = asking(pipeline).open(SAMPLE)
    pieces = len(pipeline.open_stage("decoder"))
    assert pieces > 2
    first = video.ask(QUESTIONS[1])
    assert len(driver.graphs) == 1 and driver.launches == first.new_tokens - 2, (
        "the first step runs as it is; the last token needs none"
    )
    assert len(driver.graphs[0]) == 3 + pieces, "three copies feed the step, then the pieces run"
    enqueued, allocated = trt.enqueued, driver.allocations
    second = video.ask(QUESTIONS[1])
    assert (first.text, second.text) == (want[1], want[1]) and len(driver.graphs) == 1, (
        "the next answer launches the same graph"
    )
    assert trt.enqueued - enqueued == 3 + pieces, (
        "question, similarity, pooling and prefill; every step was launched, none enqueued"
    )
    assert driver.allocations - allocated < 10 + 2 * pieces < first.new_tokens * 2, (
        "buffers of steps are not made again"
    )


def test_gpu_memory_is_freed(opened: Callable[..., Opened]) -> None:
    pipeline, driver, _ = opened("orin")
    qa = asking(pipeline)
    used = []
    for _ in range(4):
        qa.open(SAMPLE).ask(QUESTIONS[0])
        used.append(driver.used)
    assert used[1] == used[2] == used[3]


@pytest.mark.parametrize("target", TARGETS)
def test_answers_from_several_threads(opened: Callable[..., Opened], target: str, want: list[str]) -> None:
    """Even while one thread captures a step, the work of other threads stays out of its graph."""
    pipeline, *_ = opened(target)
    qa, found, lock = asking(pipeline), dict[int, str](), threading.Lock()
    video = qa.open(SAMPLE)

    def ask(i: int) -> None:
        text = video.ask(QUESTIONS[i % 3]).text
        with lock:
            found[i] = text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(6)] == [want[i % 3] for i in range(6)]


@pytest.mark.parametrize("target", ["cuda", "orin"])
def test_sampling_and_penalties_agree_with_the_cpu(
    opened: Callable[..., Opened], nano: Path, target: str
) -> None:
    pipeline, *_ = opened(target)
    on_cpu = Pipeline.open(nano, engine="standard")
    rows = on_cpu.embed_tokens([1, 5, 9, 3])
    for sampling in (
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=0.7, top_k=5, seed=3),
        Sampling(temperature=1.0, top_p=0.8, seed=4),
    ):
        assert list(pipeline.generate(rows, 8, sampling=sampling)) == list(
            on_cpu.generate(rows, 8, sampling=sampling)
        ), sampling


class Drafts(PromptLookup):
    """The right tokens, with one wrong token at a given position of every other draft."""

    def __init__(self, truth: list[int], length: int, wrong: int):
        super().__init__()
        self.truth, self.length, self.wrong = truth, length, wrong

    def draft(self, ids: Any, most: int) -> list[int]:
        guess = self.truth[len(ids) : len(ids) + min(most, self.length)]
        if self.passes % 2 and guess:
            guess[self.wrong % len(guess)] += 1
        return guess if self.passes % 3 else []


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 7), st.integers(0, 6))
def test_drafts_change_no_answer(tmp_path_factory: pytest.TempPathFactory, length: int, wrong: int) -> None:
    """Steps, captured steps and verified drafts in every order over one cache."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        nano = Path(shutil.copytree(packed_bundle(), tmp_path_factory.mktemp("drafts") / "nano"))
        pipeline, *_ = open_double(nano, "orin", monkeypatch)
        rows = pipeline.embed_tokens([1, 5, 9, 3])
        truth = list(pipeline.generate(rows, 24))
        drafts = Drafts(truth, length, wrong)
        assert list(pipeline.generate(rows, 24, lookup=drafts)) == truth and drafts.accepted


def test_a_prompt_longer_than_the_engine(opened: Callable[..., Opened]) -> None:
    pipeline, *_ = opened("orin", capacity=32)
    with pytest.raises(PromptError, match=r"40 tokens; this engine's cache holds 32.*--capacity 296"):
        pipeline.prefill(np.zeros((40, pipeline.manifest.decoder.hidden_size), np.float32))
    jetson, *_ = opened("orin-jp6", capacity=32)
    with pytest.raises(PromptError, match="this engine's cache holds 32"):
        jetson.prefill(np.zeros((40, pipeline.manifest.decoder.hidden_size), np.float32))
    ids = list(pipeline.generate(pipeline.embed_tokens(range(28)), 100))
    assert len(ids) == 5, "an answer ends where the cache does"
