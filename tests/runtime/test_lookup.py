"""Guessing tokens from what was said, and verifying them several in a pass."""

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


def test_drafts_are_what_followed_before() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6])
    assert lookup.draft([9, 2, 3], 10) == [4, 5, 6, 9, 2, 3]
    assert lookup.draft([9, 2, 3], 2) == [4, 5] and lookup.draft([9, 2, 3], 0) == []
    assert lookup.draft([3], 10) == [] and lookup.draft([8, 7], 10) == [], "one token alone says too little"
    assert PromptLookup().draft([1, 2, 7, 1, 2, 8, 1, 2], 1) == [8], "the latest occurrence counts"
    assert PromptLookup([5, 1, 2, 3, 6, 9, 2, 3, 7]).draft([1, 2, 3], 1) == [6], (
        "a longer match before a later one"
    )


@given(
    st.lists(st.integers(0, 3), max_size=30),
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.integers(-1, 12),
)
def test_drafts_are_always_a_piece_of_the_history(prompt: list[int], ids: list[int], most: int) -> None:
    draft, history = PromptLookup(prompt).draft(ids, most), [*prompt, *ids]
    assert len(draft) <= min(max(most, 0), MAX_DRAFT)
    if draft:
        end = history[-2:]
        assert any(history[i : i + 2 + len(draft)] == end + draft for i in range(len(history)))


@pytest.fixture(scope="module")
def qa(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VideoQA]:
    nano = Path(shutil.copytree(packed_bundle(), tmp_path_factory.mktemp("lookup") / "nano"))
    build_cpu(Bundle.open(nano))
    yield VideoQA(nano, device="cpu")


def test_nano_says_the_same(qa: VideoQA, tmp_path: Path) -> None:
    rng, passes, tokens = np.random.default_rng(5), 0, 0
    for _ in range(12):
        scene = sample_scene(rng)
        video = qa.open(write_clip(tmp_path / "clip.mp4", scene, rng))
        for kind in ("describe", "color", "count"):
            asked = ask(scene, kind, rng)
            if asked:
                plain, ahead = (video.ask(spoken(asked[0]), 48, look_ahead=look) for look in (False, True))
                assert (
                    plain.text == ahead.text and plain.new_tokens == ahead.new_tokens and plain.lookup is None
                )
                assert ahead.lookup is not None
                passes, tokens = passes + ahead.lookup["passes"], tokens + ahead.new_tokens - 1
    assert 0 < passes <= tokens


def test_at_the_command_line(qa: VideoQA) -> None:
    run = run_command(
        "ppllava-run",
        SAMPLE,
        "Describe the video.",
        "--model",
        qa.pipeline.bundle.path,
        "--look-ahead",
        "--json",
    )
    told = json.loads(run.stdout)
    assert (
        told["engine"] == "cpu" and told["lookup"]["passes"] >= 1 and told["text"].startswith("a red circle")
    )
    assert_one_line_error(
        run_command("ppllava-run", SAMPLE, "Describe the video.", "--look-ahead"),
        "ppllava-build",
        "--target cpu",
    )
    assert_one_line_error(
        run_command("ppllava-run", SAMPLE, "x", "--engine", "fast"),
        "'fast' is unknown",
        "onnxruntime",
        "orin-jp6",
    )
    assert_one_line_error(
        run_command("ppllava-run", SAMPLE, "x", "--engine", "rtx", "--device", "cpu"),
        "doesn't run on the cpu",
    )


def test_an_engine_whose_passes_disagree_is_left_alone(qa: VideoQA, monkeypatch: pytest.MonkeyPatch) -> None:
    """INT4 decoders of a real width: a pass over several positions rounds activations differently from single steps."""
    video, decoder = qa.open(SAMPLE), qa.pipeline.decoder
    want = video.ask("Describe the video.")
    assert decoder.disagreement(qa.pipeline.embed_tokens) < 1e-3
    monkeypatch.setattr(decoder, "_disagreement", 0.06)
    answer = video.ask("Describe the video.", look_ahead=True)
    assert (
        answer.text == want.text
        and answer.lookup is None
        and "looking ahead was left out" in answer.notes[-1]
    )


def test_where_activations_are_rounded_it_is_left_out(tmp_path: Path) -> None:
    output = tmp_path / "b"
    run = run_command("ppllava-export", packed_bundle(), "-o", output, "--precision", "int4", "--weight-only")
    assert run.returncode == 0, run.stderr
    run = run_command(
        "ppllava-run", SAMPLE, "Describe the video.", "--model", output, "--look-ahead", "--json"
    )
    told = json.loads(run.stdout)
    assert (
        told["lookup"] is None
        and "looking ahead was left out" in told["notes"][-1]
        and "note: looking ahead was left out" in run.stderr
    )
    assert rounds_activations("int8", "orin") and rounds_activations("int4", "cpu")
    assert not rounds_activations("int4", "orin") and not rounds_activations("fp16", "cpu")


def test_how_disagreement_is_measured() -> None:
    rows = np.random.default_rng(0).standard_normal((8, 50))
    assert disagreement(list(rows), rows) == 0
    assert 0.09 < disagreement(list(rows), rows + np.eye(8, 50) * 0.1) < 0.12


def test_what_it_does_not_go_with(qa: VideoQA) -> None:
    video = qa.open(SAMPLE)
    with pytest.raises(PromptError, match="greedy"):
        video.ask("What color is the circle?", sampling=Sampling(temperature=0.5), look_ahead=True)
    with pytest.raises(EngineError, match="ppllava-build"):
        VideoQA(device="cpu").open(SAMPLE).ask("What color is the circle?", look_ahead=True)
    sequence = qa.pipeline.decoder.start(4, 4)
    with pytest.raises(EngineError, match="can't be taken back"):
        sequence.forget(1)
