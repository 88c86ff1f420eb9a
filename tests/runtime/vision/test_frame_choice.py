"""The sampled frames equal those of upstream, in order, and are within the requested range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import upstream_samplers
from helpers.commands import GOLDEN, SAMPLE, frame_number
from ppllava_edge import VideoQA
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.vision.frame_choice import read_frames, sample_indices

INDICES = json.loads((GOLDEN / "frames" / "frame_indices.json").read_text())
TRAINING_CASES = [case for case in INDICES["get_frame_indices"] if case["sample"] != "start"]


# -- upstream's samplers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", INDICES["get_index"], ids=str)
def test_sample_indices(case: dict[str, Any]) -> None:
    segments = case["num_segments"]
    bound = tuple(case["bound"]) if case["bound"] else None
    duration = bound[1] - bound[0] if bound else case["max_frame"] / case["fps"]
    if segments > 0:
        frames = segments
    elif segments == 0:
        frames = case["assigned_frame"]
    else:
        frames = upstream_samplers.frames_for_duration(-segments, duration)
    found = sample_indices(case["n_frames_total"], case["fps"], frames, bound, case["first_idx"])
    assert found == case["indices"]


@pytest.mark.parametrize("case", INDICES["get_seq_frames"], ids=str)
def test_centred_indices(case: dict[str, Any]) -> None:
    if isinstance(case["indices"], str):
        with pytest.raises(ZeroDivisionError):
            upstream_samplers.centred_indices(case["total"], case["desired"])
    else:
        assert upstream_samplers.centred_indices(case["total"], case["desired"]) == case["indices"]


@pytest.mark.parametrize("case", TRAINING_CASES, ids=str)
def test_indices_of_the_training_sampler(case: dict[str, Any]) -> None:
    if case["sample"] == "middle":
        found = upstream_samplers.middle_indices(case["num_frames"], case["vlen"])
    else:
        rate = float(case["sample"].removeprefix("fps"))
        limit = case["max_num_frames"]
        found = upstream_samplers.indices_at_rate(rate, case["vlen"], case["input_fps"], limit)
    assert found == case["indices"]


@given(st.integers(1, 5000), st.floats(0.5, 120), st.integers(1, 128))
def test_sampled_indices_are_ascending_frames_of_the_video(count: int, fps: float, frames: int) -> None:
    found = sample_indices(count, fps, frames)
    assert len(found) == frames and found == sorted(found)
    assert found[0] >= 0 and found[-1] < count


# -- ranges and counts ---------------------------------------------------------------------------------------


def test_a_range(video_file: Path) -> None:
    found = read_frames(video_file, 4, start=0.5, end=1.5)
    assert found.indices == sample_indices(24, 12.0, 4, (0.5, 1.5))
    assert found.indices[0] >= 6 and found.indices[-1] <= 18
    assert [frame_number(image) for image in found.images] == found.indices
    assert read_frames(video_file, 4, start=1.0).indices[0] >= 12
    for start, end in ((5, 9), (1.5, 0.5)):
        with pytest.raises(MediaError, match="no frames of"):
            read_frames(video_file, 4, start=start, end=end)
    with pytest.raises(MediaError, match=r"^start must"):
        read_frames(video_file, 4, start=-1)


def test_a_short_video_repeats_frames(video_file: Path) -> None:
    found = read_frames(video_file, 60)
    assert len(found.images) == 60 and sorted(set(found.indices)) == list(range(24))


@pytest.mark.parametrize("frames", [0, -3, 10**6])
def test_impossible_frame_counts(video_file: Path, frames: int) -> None:
    with pytest.raises(MediaError, match=r"^frames must"):
        read_frames(video_file, frames)


@pytest.mark.parametrize("time", [float("nan"), float("inf"), float("-inf")])
def test_times_that_are_no_numbers_with_automatic_frames(time: float) -> None:
    qa = VideoQA(device="cpu")
    for name in ("start", "end"):
        with pytest.raises(MediaError, match=f"{name} must be 0 or more seconds, not {time:g}"):
            qa.open(SAMPLE, frames="auto", **{name: time})  # type: ignore[arg-type]
