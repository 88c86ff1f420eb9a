"""How many frames the model sees of a video, and how many visual tokens they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.commands import SAMPLE, assert_one_line_error, run_command
from ppllava_edge import MediaError, VideoQA
from ppllava_edge.engines.bundle.windows import Windows, within_budget
from ppllava_edge.runtime.media.writing import write_video
from ppllava_edge.runtime.vision.frame_choice import frames_for_length

QUESTION = "What color is the circle?"


@settings(max_examples=200)
@given(st.integers(2, 300), st.integers(3, 27), st.integers(1, 2000))
def test_windows_keep_within_the_budget(frames: int, side: int, tokens: int) -> None:
    windows = within_budget(Windows((2, 3, 3), (2, 3, 3), None), (frames, side, side), tokens)
    output, kernel, stride = windows.resolve((frames, side, side))
    assert 1 <= output[0] * output[1] * output[2] <= tokens and kernel == stride
    if tokens >= 2 * (side // 3) ** 2:
        assert kernel[1:] == (3, 3), "time is pooled before space"


def test_the_released_models_budget_is_its_own_windows() -> None:
    windows = Windows((2, 3, 3), (2, 3, 3), None)
    assert within_budget(windows, (32, 24, 24), 1024).kernel == (2, 3, 3)
    assert within_budget(windows, (64, 24, 24), 1024).kernel == (4, 3, 3)
    assert within_budget(windows, (256, 24, 24), 1024).kernel == (16, 3, 3)


@given(st.floats(0, 1e5), st.integers(1, 64), st.one_of(st.none(), st.integers(1, 64)), st.integers(1, 4))
def test_frames_grow_with_the_length_up_to_the_models_limit(
    duration: float, default: int, limit: int | None, step: int
) -> None:
    count = frames_for_length(duration, default, limit, step)
    assert 1 <= count <= (limit or 512) and count <= frames_for_length(duration + 100, default, limit, step)


@pytest.mark.slow
def test_auto_frames_and_tokens(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Without an adapter, a longer video gives more frames, and no more tokens than a short one."""
    clip = write_video(tmp_path / "long.mp4", np.zeros((130, 32, 32, 3), np.uint8), fps=1)
    bundle = tmp_path / "plain"
    options = ("--precision", "fp32", "--kernel", "2,3,3", "--stride", "2,3,3")
    assert run_command("ppllava-export", tiny_checkpoint, "-o", bundle, *options).returncode == 0
    qa = VideoQA(bundle, device="cpu")
    m = qa.pipeline.manifest
    video = qa.open(clip, frames="auto")
    answer = video.ask("What?", 1)
    fits = frames_for_length(130, m.vision.default_frames, m.vision.max_frames, 2)
    assert len(answer.frame_indices) == fits
    own = m.pooling.video.resolve((m.vision.default_frames, *m.vision.grid))[0]
    assert answer.visual_tokens <= own[0] * own[1] * own[2]
    assert qa.open(clip, frames=8, tokens=8).ask("What?", 1).visual_tokens <= 8
    for wrong in ({"frames": "many"}, {"tokens": 0}):
        with pytest.raises(MediaError):
            qa.open(clip, **wrong)  # type: ignore[arg-type]
    assert_one_line_error(run_command("ppllava-run", SAMPLE, "What?", "--tokens", "0"), "--tokens")
    run = run_command("ppllava-run", SAMPLE, QUESTION, "--frames", "auto", "--tokens", "18", "--json")
    assert json.loads(run.stdout)["visual_tokens"] <= 18


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frames": 1}, "use frames=2 or more"),
        ({"frames": 2.5}, "frames must be a number or auto"),
        ({"tokens": "2"}, "tokens must be"),
        ({"candidates": "2", "select": "guided"}, "candidates must be"),
        ({"start": "0:10"}, "start must be a number of seconds"),
        ({"end": "2"}, "end must be a number of seconds"),
    ],
)
def test_frame_options_that_cannot_be_used_are_refused_when_the_video_is_opened(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(MediaError, match=words):
        VideoQA(device="cpu").open(SAMPLE, **options)


def test_numpy_numbers_are_options() -> None:
    video = VideoQA(device="cpu").open(SAMPLE, frames=np.int64(4), start=np.float32(0.5))  # type: ignore[arg-type]
    assert len(video.ask(QUESTION, 1).frame_indices) == 4


def test_one_frame_in_memory_fills_a_pooling_window() -> None:
    video = VideoQA(device="cpu").open([np.zeros((64, 64, 3), np.uint8)])
    assert video.ask(QUESTION).frame_indices == [0, 0]


def test_a_token_budget_for_a_picture_that_is_read_as_a_video(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle, picture = tmp_path / "npu", tmp_path / "still.png"
    options = ("--precision", "fp32", "--pooling", "pllava_npu", "--output-size", "1,2,2")
    run = run_command("ppllava-export", tiny_checkpoint, "-o", bundle, *options)
    assert run.returncode == 0, run.stderr
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
    assert VideoQA(bundle, device="cpu").open(picture, frames=4, tokens=9).ask("What?", 1).visual_tokens <= 9
