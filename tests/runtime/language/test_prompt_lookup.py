"""Prompt lookup: drafts come from the history, and answers are the same with and without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.commands import SAMPLE, assert_one_line_error, run_command
from ppllava_edge import VideoQA
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import EngineError, PromptError
from ppllava_edge.engines.targets.build import build_cpu
from ppllava_edge.nano.clips import spoken, write_clip
from ppllava_edge.nano.world import ask, sample_scene
from ppllava_edge.runtime.language.prompt_lookup import (
    MAX_DRAFT,
    PromptLookup,
    disagreement,
    rounds_activations,
)
from ppllava_edge.runtime.language.sampling import Sampling

DESCRIBE = "Describe the video."
COLOR = "What color is the circle?"


@pytest.fixture(scope="module")
def qa(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VideoQA]:
    """Nano, with an engine that verifies several tokens in a pass."""
    nano = Path(shutil.copytree(packed_bundle(), tmp_path_factory.mktemp("lookup") / "nano"))
    build_cpu(Bundle.open(nano))
    yield VideoQA(nano, device="cpu")


# -- drafts --------------------------------------------------------------------------------------------------


def test_drafts_are_the_tokens_that_followed_the_same_tokens_earlier() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6])
    assert lookup.draft([9, 2, 3], 10) == [4, 5, 6, 9, 2, 3]
    assert lookup.draft([9, 2, 3], 2) == [4, 5]
    assert lookup.draft([9, 2, 3], 0) == []
    assert lookup.draft([3], 10) == [] and lookup.draft([8, 7], 10) == [], "a single token is no match"


def test_the_best_match_is_the_longest_then_the_latest() -> None:
    assert PromptLookup().draft([1, 2, 7, 1, 2, 8, 1, 2], 1) == [8]
    assert PromptLookup([5, 1, 2, 3, 6, 9, 2, 3, 7]).draft([1, 2, 3], 1) == [6]


@given(
    st.lists(st.integers(0, 3), max_size=30),
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.integers(-1, 12),
)
def test_drafts_are_always_a_piece_of_the_history(prompt: list[int], ids: list[int], limit: int) -> None:
    draft = PromptLookup(prompt).draft(ids, limit)
    history = [*prompt, *ids]
    assert len(draft) <= min(max(limit, 0), MAX_DRAFT)
    if draft:
        end = history[-2:]
        assert any(history[i : i + 2 + len(draft)] == end + draft for i in range(len(history)))


# -- answers -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_answers_are_the_same_with_and_without_looking_ahead(qa: VideoQA, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    passes = tokens = 0
    for _ in range(12):
        scene = sample_scene(rng)
        video = qa.open(write_clip(tmp_path / "clip.mp4", scene, rng))
        for kind in ("describe", "color", "count"):
            asked = ask(scene, kind, rng)
            if not asked:
                continue
            plain = video.ask(spoken(asked[0]), 48, look_ahead=False)
            drafted = video.ask(spoken(asked[0]), 48, look_ahead=True)
            assert (drafted.text, drafted.new_tokens) == (plain.text, plain.new_tokens)
            assert plain.lookup is None and drafted.lookup is not None
            passes += drafted.lookup["passes"]
            tokens += drafted.new_tokens - 1
    assert 0 < passes <= tokens


def test_at_the_command_line(qa: VideoQA) -> None:
    bundle = qa.pipeline.bundle.path
    run = run_command("ppllava-run", SAMPLE, DESCRIBE, "--model", bundle, "--look-ahead", "--json")
    answer = json.loads(run.stdout)
    assert answer["engine"] == "cpu" and answer["lookup"]["passes"] >= 1
    assert answer["text"].startswith("a red circle")
    run = run_command("ppllava-run", SAMPLE, DESCRIBE, "--look-ahead")
    assert_one_line_error(run, "ppllava-build", "--target cpu")
    run = run_command("ppllava-run", SAMPLE, "x", "--engine", "fast")
    assert_one_line_error(run, "'fast' is unknown", "onnxruntime", "orin-jp6")
    run = run_command("ppllava-run", SAMPLE, "x", "--engine", "rtx", "--device", "cpu")
    assert_one_line_error(run, "doesn't run on the cpu")


def test_looking_ahead_needs_greedy_answers_and_an_engine(qa: VideoQA) -> None:
    with pytest.raises(PromptError, match="greedy"):
        qa.open(SAMPLE).ask(COLOR, sampling=Sampling(temperature=0.5), look_ahead=True)
    with pytest.raises(EngineError, match="ppllava-build"):
        VideoQA(device="cpu").open(SAMPLE).ask(COLOR, look_ahead=True)
    sequence = qa.pipeline.decoder.start(4, 4)
    with pytest.raises(EngineError, match="can't be taken back"):
        sequence.forget(1)


# -- engines whose passes give other logits than single steps ------------------------------------------------


def test_looking_ahead_is_left_out_if_passes_disagree_with_single_steps(
    qa: VideoQA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INT4 decoders of a real width round activations differently in a pass over several positions."""
    video, decoder = qa.open(SAMPLE), qa.pipeline.decoder
    expected = video.ask(DESCRIBE)
    assert decoder.disagreement() < 1e-3
    monkeypatch.setattr(decoder, "_disagreement", 0.06)
    answer = video.ask(DESCRIBE, look_ahead=True)
    assert answer.text == expected.text and answer.lookup is None
    assert "looking ahead was left out" in answer.notes[-1]


def test_looking_ahead_is_left_out_if_activations_are_rounded(tmp_path: Path) -> None:
    bundle = tmp_path / "int4"
    run = run_command("ppllava-export", packed_bundle(), "-o", bundle, "--precision", "int4", "--weight-only")
    assert run.returncode == 0, run.stderr
    run = run_command("ppllava-run", SAMPLE, DESCRIBE, "--model", bundle, "--look-ahead", "--json")
    answer = json.loads(run.stdout)
    assert answer["lookup"] is None and "looking ahead was left out" in answer["notes"][-1]
    assert "note: looking ahead was left out" in run.stderr


def test_rounds_activations_names_the_right_decoders() -> None:
    assert rounds_activations("int8", "orin") and rounds_activations("int4", "cpu")
    assert not rounds_activations("int4", "orin") and not rounds_activations("fp16", "cpu")


def test_how_disagreement_is_measured() -> None:
    rows = np.random.default_rng(0).standard_normal((8, 50))
    assert disagreement(list(rows), rows) == 0
    assert 0.09 < disagreement(list(rows), rows + np.eye(8, 50) * 0.1) < 0.12
