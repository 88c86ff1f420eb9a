"""Encoded videos in the feature cache: opened again without decoding or encoding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.commands import SAMPLE
from ppllava_edge import MediaError, VideoQA
from ppllava_edge.runtime.encoding.cached_features import CachedFeatures
from ppllava_edge.runtime.session.attention_map import attention_picture
from ppllava_edge.runtime.vision.frame_options import FrameOptions

QUESTION, DESCRIBE = "What color is the circle?", "Describe the video."


def test_a_restart_answers_without_opening_the_video_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = VideoQA(device="cpu", cache=tmp_path / "cache").open(SAMPLE)
    want = first.ask(DESCRIBE)
    assert want.timings["vision"] > 0 and want.time_to_first_token["first_ask"] is not None
    monkeypatch.setattr(
        "ppllava_edge.runtime.video_qa.reader_of", lambda *arguments: pytest.fail("the video was opened")
    )
    again = VideoQA(device="cpu", cache=tmp_path / "cache").open(SAMPLE)
    answer = again.ask(DESCRIBE)
    assert answer.text == want.text and answer.timings["vision"] == answer.timings["video_decode"] == 0
    assert answer.frame_times == want.frame_times and answer.moments == want.moments
    assert answer.time_to_first_token["first_ask"] is None
    np.testing.assert_array_equal(again.features, first.features)


def test_pictures_of_a_cached_video_are_read_again(tmp_path: Path) -> None:
    fresh = VideoQA(device="cpu", cache=tmp_path).open(SAMPLE)
    cached = VideoQA(device="cpu", cache=tmp_path).open(SAMPLE)
    assert cached.frames.images == [] and cached.frames.indices == fresh.frames.indices
    np.testing.assert_array_equal(attention_picture(cached, QUESTION), attention_picture(fresh, QUESTION))


def test_sources_that_cannot_be_opened_with_a_cache(tmp_path: Path) -> None:
    qa = VideoQA(device="cpu", cache=tmp_path / "cache")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("nothing.mp4", "no such file"), ("pipe", "not a regular file")):
        with pytest.raises(MediaError, match=words):
            qa.open(tmp_path / name)


def test_another_video_sampling_or_bundle_is_another_entry(
    tmp_path: Path, tiny_bundle: Path, video_file: Path
) -> None:
    qa = VideoQA(device="cpu", cache=tmp_path)
    for arguments in ({}, {"frames": 6}, {"end": 1.0}, {"select": "guided", "candidates": 16}, {"tokens": 9}):
        assert qa.open(SAMPLE, **arguments).ask(QUESTION).timings["vision"] > 0, arguments  # type: ignore[arg-type]
        assert qa.open(SAMPLE, **arguments).ask(QUESTION).timings["vision"] == 0, arguments  # type: ignore[arg-type]
    assert qa.open(video_file).ask(QUESTION).timings["vision"] > 0
    other = VideoQA(tiny_bundle, device="cpu", cache=tmp_path)
    assert other.open(SAMPLE, frames=4).ask("?", 1).timings["vision"] > 0
    assert len(list(tmp_path.glob("*.features"))) == 7


def test_guided_candidates_come_back_from_disk(tmp_path: Path) -> None:
    first = VideoQA(device="cpu", cache=tmp_path).open(SAMPLE, select="guided", candidates=24)
    again = VideoQA(device="cpu", cache=tmp_path).open(SAMPLE, select="guided", candidates=24)
    want, answer = first.ask("What color is the cross?"), again.ask("What color is the cross?")
    assert answer.text == want.text == "yellow"
    assert answer.frame_indices == want.frame_indices and answer.timings["vision"] == 0


def test_an_entry_of_another_version_is_encoded_anew(tmp_path: Path) -> None:
    qa = VideoQA(device="cpu", cache=tmp_path)
    qa.open(SAMPLE)
    assert qa.cache is not None
    key = CachedFeatures(qa.cache, qa.pipeline, SAMPLE, FrameOptions())._key
    cached = qa.cache.load(*key)
    assert cached is not None
    cached.facts["something new"] = 1
    qa.cache.store(cached, *key)
    assert qa.open(SAMPLE).ask(QUESTION).timings["vision"] > 0


def test_the_cache_key_never_changes(tmp_path: Path) -> None:
    """An entry's key holds the options as text: a renamed class would orphan what users have cached."""
    qa = VideoQA(device="cpu", cache=tmp_path)
    entry = CachedFeatures(qa.cache, qa.pipeline, SAMPLE, FrameOptions(8))
    assert entry._key[-1] == (
        "Look(frames=8, start=None, end=None, tokens=None, select='uniform', candidates=256)"
    )


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("kind", "radio"),
        ("indices", [0] * 200_000),
        ("indices", [-1] * 4),
        ("indices", []),
        ("times", [0.0]),
        ("times", [1e300] * 4),
        ("count", 1 << 60),
        ("image_size", [1, 1]),
        ("image_size", [1 << 40, 1 << 40]),
        ("notes", ["x" * 5000]),
        ("windows", {"kernel": [1 << 50, 1, 1], "stride": [1, 1, 1]}),
        ("windows", "all"),
        ("fps", None),
    ],
)
def test_facts_that_cannot_be_are_encoded_anew(tmp_path: Path, fact: str, value: object) -> None:
    """A file with good checksums may still be of another program, or hostile."""
    qa = VideoQA(device="cpu", cache=tmp_path)
    qa.open(SAMPLE, frames=4)
    assert qa.cache is not None
    key = CachedFeatures(qa.cache, qa.pipeline, SAMPLE, FrameOptions(4))._key
    cached = qa.cache.load(*key)
    assert cached is not None
    cached.facts[fact] = value
    qa.cache.store(cached, *key)
    assert qa.open(SAMPLE, frames=4).ask(QUESTION).timings["vision"] > 0


@pytest.mark.parametrize("change", ["rows", "width", "frames", "type", "states"])
def test_arrays_that_do_not_fit_the_model_are_encoded_anew(tmp_path: Path, change: str) -> None:
    qa = VideoQA(device="cpu", cache=tmp_path)
    arguments = {"select": "guided", "candidates": 16}
    qa.open(SAMPLE, **arguments)  # type: ignore[arg-type]
    assert qa.cache is not None
    key = CachedFeatures(qa.cache, qa.pipeline, SAMPLE, FrameOptions(**arguments))._key  # type: ignore[arg-type]
    cached = qa.cache.load(*key)
    assert cached is not None
    features, states = cached.arrays["features"], cached.arrays["states"]
    changed = {
        "rows": {"features": features[:, 1:]},
        "width": {"features": features[:, :, 1:]},
        "frames": {"features": features[1:]},
        "type": {"features": features.astype(np.int8)},
        "states": {"states": states[:, :, 1:]},
    }
    cached.arrays |= changed[change]
    qa.cache.store(cached, *key)
    assert qa.open(SAMPLE, **arguments).ask(QUESTION).timings["vision"] > 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "fact", "value"),
    [
        ({}, "windows", {"kernel": [4096, 1, 1], "stride": [1, 1, 1], "output_size": None}),
        ({"select": "guided", "candidates": 16}, "count", 16),
        ({"select": "guided", "candidates": 16}, "count", 1),
    ],
)
def test_a_choice_of_frames_that_cannot_be_pooled_is_encoded_anew(
    tmp_path: Path, options: dict[str, Any], fact: str, value: object
) -> None:
    qa = VideoQA(device="cpu", cache=tmp_path)
    qa.open(SAMPLE, **options)
    assert qa.cache is not None
    key = CachedFeatures(qa.cache, qa.pipeline, SAMPLE, FrameOptions(**options))._key
    cached = qa.cache.load(*key)
    assert cached is not None
    cached.facts[fact] = value
    qa.cache.store(cached, *key)
    assert qa.open(SAMPLE, **options).ask(QUESTION).timings["vision"] > 0


def test_an_image_of_other_tiles_is_encoded_anew(tmp_path: Path) -> None:
    path, qa = tmp_path / "image.png", VideoQA(device="cpu", cache=tmp_path / "cache")
    Image.new("RGB", (300, 200), "red").save(path)
    qa.open(path)
    assert qa.cache is not None
    key = CachedFeatures(qa.cache, qa.pipeline, path, FrameOptions())._key
    cached = qa.cache.load(*key)
    assert cached is not None and qa.open(path).ask(DESCRIBE).timings["vision"] == 0
    cached.facts["image_size"] = [50, 2000]
    qa.cache.store(cached, *key)
    assert qa.open(path).ask(DESCRIBE).timings["vision"] > 0
