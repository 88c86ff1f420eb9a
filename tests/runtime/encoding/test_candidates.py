"""Guided selection: the question chooses frames out of encoded candidates."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import SAMPLE, assert_one_line_error, run_command
from ppllava_edge import MediaError, VideoQA
from ppllava_edge.nano.clips import sample_scene_for_the_readme
from ppllava_edge.nano.world import STILL, VELOCITY, draw
from ppllava_edge.runtime.encoding import candidates
from ppllava_edge.runtime.media.writing import write_video


@pytest.fixture(scope="module")
def qa() -> VideoQA:
    return VideoQA(device="cpu")


def needle_clip(path: Path, seconds: int = 60, at: float = 37.0, length: float = 1.2) -> Path:
    """A red circle rests for a minute; a yellow cross is there for about a second."""
    scene = sample_scene_for_the_readme()
    scene = replace(
        scene,
        motions=np.array([STILL, STILL, STILL]),
        velocity=VELOCITY[[STILL] * 3],
        appears=np.array([0, 0, at], np.float32),
        vanishes=np.array([1e9, 1e9, at + length], np.float32),
    )
    return write_video(path, draw(scene, np.arange(seconds * 5) / 5, np.random.default_rng(0), 216)[0], fps=5)


def test_a_needle_is_found_by_guided_selection_and_missed_without(qa: VideoQA, tmp_path: Path) -> None:
    clip, question = needle_clip(tmp_path / "needle.mp4"), "What color is the cross?"
    uniform = qa.open(clip).ask(question)
    guided = qa.open(clip, select="guided", candidates=120).ask(question)
    assert guided.text == "yellow" != uniform.text
    assert any(37 <= t <= 38.2 for t in guided.frame_times)
    assert not any(37 <= t <= 38.2 for t in uniform.frame_times)
    assert 37 <= guided.moments[0].seconds <= 38.2
    assert guided.frame_times == sorted(guided.frame_times) and len(guided.frame_times) == 8
    assert guided.timings["select"] > 0


def test_candidates_are_mapped_from_disk_when_they_are_many(
    qa: VideoQA, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = qa.open(SAMPLE, select="guided", candidates=30).ask("What color is the cross?")
    monkeypatch.setattr(candidates, "IN_MEMORY", 1000)
    video = qa.open(SAMPLE, select="guided", candidates=30)
    encoded = video.encoded_video.candidates
    assert encoded is not None and isinstance(encoded.states, np.memmap)
    answer = video.ask("What color is the cross?")
    assert (answer.text, answer.frame_indices) == (want.text, want.frame_indices)


def test_a_short_clip_has_nothing_to_choose_from(
    qa: VideoQA, tmp_path: Path, moving_frames: np.ndarray
) -> None:
    short = write_video(tmp_path / "short.mp4", moving_frames[:5], fps=5)
    np.testing.assert_allclose(qa.open(short, select="guided").features, qa.open(short).features, atol=2e-3)
    with pytest.raises(MediaError, match=r"^select"):
        qa.open(SAMPLE, select="best")
    with pytest.raises(MediaError, match=r"^candidates must"):
        qa.open(SAMPLE, select="guided", candidates=0)


def test_guided_selection_needs_guided_pooling(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "pllava"
    options = ("--precision", "fp32", "--pooling", "pllava", "--output-size", "4,2,2")
    assert run_command("ppllava-export", tiny_checkpoint, "-o", bundle, *options).returncode == 0
    arguments = (SAMPLE, "What?", "--model", bundle, "--frames", "4")
    run = run_command("ppllava-run", *arguments, "--select", "guided")
    assert_one_line_error(run, "--select guided", "pllava")
    run = run_command("ppllava-run", *arguments, "--tokens", "9")
    assert_one_line_error(run, "--tokens", "windowed pooling")
    answer = VideoQA(bundle, device="cpu").open(SAMPLE, frames=4).ask("What?", 2)
    assert answer.moments == []


def test_a_full_disk_is_one_line(qa: VideoQA, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check, writing to the mapping would kill the process."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(candidates, "IN_MEMORY", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        MediaError, match=r"encoded frames can't be written to .* \(No space left on device\)"
    ):
        qa.open(SAMPLE, select="guided", frames=4, candidates=16)


def test_frames_go_to_a_file_if_memory_is_short(qa: VideoQA, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", no_memory)
        array = candidates.array_for((3, 5), np.dtype(np.float32))
    assert isinstance(array, np.memmap) and array.shape == (3, 5)
    array[:] = 1
    assert array.sum() == 15
