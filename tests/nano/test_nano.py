"""Nano: its world, and how often the packed model answers right."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.commands import SAMPLE
from ppllava_edge import VideoQA
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.nano import world
from ppllava_edge.nano.clips import clip_frames, spoken
from ppllava_edge.nano.evaluate import evaluate, summary
from ppllava_edge.nano.vocabulary import GROUPS, TEXT_ID, TEXTS, WORD_ID


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_scenes_keep_their_rules_and_questions_use_known_words(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = world.sample_scene(rng)
    assert 1 <= len(scene) <= world.MAX_OBJECTS
    assert len(set(scene.colors)) == len(set(scene.shapes)) == len(scene)
    centers = scene.centers(np.linspace(0, world.STEPS - 0.5, 9))
    assert (centers > scene.radius[:, None]).all() and (centers < world.FRAME - scene.radius[:, None]).all()
    assert not (scene.staggered and scene.brief is not None)
    if scene.staggered:
        assert len(set(scene.appears)) == len(scene)
    for kind in world.KINDS:
        asked = world.ask(scene, kind, rng)
        if asked is not None:
            assert asked[0] in TEXT_ID and all(word in WORD_ID for word in asked[1].split())


def test_objects_are_drawn_in_their_colours_while_they_are_visible() -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        scene, times = world.sample_scene(rng), np.arange(world.STEPS) + 0.5
        frames, owner = world.draw(scene, times, rng)
        for i in range(len(scene)):
            shown = np.flatnonzero((owner == i).any((1, 2)))
            there = np.flatnonzero((times >= scene.appears[i]) & (times < scene.vanishes[i]))
            assert set(shown) <= set(there)
            pixels = frames[owner == i].astype(float)
            if len(pixels):
                assert np.abs(np.median(pixels, 0) - world.COLOR_VALUES[scene.colors[i]]).max() < 25


def test_drawing_scales() -> None:
    scene = world.sample_scene(np.random.default_rng(0))
    small = world.draw(scene, np.array([1.0]), np.random.default_rng(0), noise=0)[0][0].astype(float)
    large = world.draw(scene, np.array([1.0]), np.random.default_rng(0), size=216, noise=0)[0][0]
    large = large.astype(float)
    assert np.abs(large.reshape(108, 2, 108, 2, 3).mean((1, 3)) - small).mean() < 1


def test_the_same_seed_draws_the_same_clip() -> None:
    draws = [
        clip_frames(world.sample_scene(rng), rng)
        for rng in (np.random.default_rng(5), np.random.default_rng(5))
    ]
    assert np.array_equal(*draws)


def test_every_text_is_in_one_group() -> None:
    assert sorted(i for ids in GROUPS.values() for i in ids) == list(range(len(TEXTS)))
    assert spoken("what color is the circle ?") == "What color is the circle?"


# -- the packed model ----------------------------------------------------------------------------------------


def test_the_packed_bundle_is_small_and_whole() -> None:
    bundle = Bundle.open(packed_bundle(), verify=True)
    assert bundle.total_bytes <= 8_000_000 and bundle.manifest.demo
    m = bundle.manifest
    assert m.vision.max_frames and m.question and m.question.length == 248
    assert m.pooling.video.kernel == (2, 3, 3) and m.pooling.temperature == pytest.approx(0.01)


@pytest.fixture(scope="module")
def answers() -> list[dict[str, str]]:
    return evaluate(None, 400, seed=2024)


def test_it_answers_right_on_held_out_clips(answers: list[dict[str, str]]) -> None:
    """docs/nano.md has the full table; this is a sample, with room for chance."""
    found = summary(answers)
    assert found["all"]["exact"] >= 0.96, found


@pytest.mark.slow
def test_accuracy_falls_without_guidance(answers: list[dict[str, str]]) -> None:
    """With equal pooling weights accuracy falls, so a runtime that loses the guidance is noticed."""
    uniform = summary(evaluate(None, 200, seed=2024, uniform=True))["all"]["exact"]
    guided = summary(answers)["all"]["exact"]
    assert uniform < guided - 0.15, (uniform, guided)


def test_the_evaluation_command() -> None:
    command = [sys.executable, "-m", "ppllava_edge.nano.evaluate"]
    command += ["--questions", "20", "--seed", "9", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(run.stdout)
    assert len(found["answers"]) == 20
    assert set(found["answers"][0]) == {"kind", "question", "expected", "answer"}
    assert found["summary"]["all"]["asked"] == 20


@pytest.mark.parametrize(
    "question",
    [
        "What color is the circle?",
        "what colour is the circle",
        "WHAT COLOR IS THE CIRCLE ?",
        "What is the weather on Mars today, and why?",
    ],
)
def test_questions_as_people_type_them(question: str) -> None:
    answer = VideoQA().open(SAMPLE).ask(question, max_new_tokens=20)
    assert answer.text == "red" or "Mars" in question
