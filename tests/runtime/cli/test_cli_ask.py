"""ppllava-run with one video, as a user types it: answers, chats, attention maps, sampling."""

from __future__ import annotations

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from helpers.commands import ROOT, SAMPLE, run_command

QUESTION, ANSWER = "What color is the circle?", "red"


def test_the_demonstration_answers() -> None:
    run = run_command("ppllava-run", SAMPLE, QUESTION)
    assert run.returncode == 0 and run.stdout == f"{ANSWER}\n", run.stderr
    assert "tiny demonstration model" in run.stderr and "ppllava-export" in run.stderr


def test_nano_names_the_packed_bundle_despite_a_folder_of_that_name() -> None:
    run = run_command("ppllava-run", SAMPLE, QUESTION, "--model", "nano", cwd=ROOT)
    assert (ROOT / "nano").is_dir() and run.returncode == 0 and run.stdout == f"{ANSWER}\n", run.stderr


def test_help_groups_the_options() -> None:
    lines = run_command("ppllava-run", "--help").stdout.splitlines()
    headings = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Model",
        "Frames",
        "Generation",
        "Chat",
        "Live view (with --live)",
        "Batch (with --batch)",
        "Output",
        "Other options",
    ]


def test_json_says_everything() -> None:
    run = run_command("ppllava-run", SAMPLE, QUESTION, "--json", "--frames", "6")
    answer = json.loads(run.stdout)
    assert answer["text"] == ANSWER and answer["model"] == "nano" and answer["finish"] == "stop"
    assert len(answer["frame_indices"]) == len(answer["frame_times"]) == 6
    assert answer["visual_tokens"] == 27 and answer["new_tokens"] == 2 and answer["text_tokens"] > 4
    stages = ("queue", "video_decode", "vision", "question", "select", "pooling", "prefill")
    assert set(answer["timings"]) == {*stages, "first_token", "generate"}
    assert all(seconds >= 0 for seconds in answer["timings"].values())
    t = answer["timings"]
    parts = sum(t[name] for name in stages)
    assert t["first_token"] == pytest.approx(parts, abs=1e-6)


def test_questions_from_a_pipe_encode_the_video_once() -> None:
    run = run_command("ppllava-run", SAMPLE, "--json", stdin=f"{QUESTION}\n\nHow many objects are there?\n")
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(answers) == 2 and answers[0]["text"] == ANSWER
    assert answers[0]["timings"]["vision"] > 0
    assert answers[1]["timings"]["vision"] == answers[1]["timings"]["video_decode"] == 0


def test_a_chat_at_the_command_line() -> None:
    run = run_command("ppllava-run", SAMPLE, "--keep", "prefix", "--json", stdin=f"{QUESTION}\n{QUESTION}\n")
    first, second = (json.loads(line) for line in run.stdout.splitlines())
    assert first["text"] == second["text"] == ANSWER and second["timings"]["pooling"] == 0


def test_the_feature_cache_at_the_command_line(tmp_path: Path) -> None:
    runs = [
        json.loads(run_command("ppllava-run", SAMPLE, QUESTION, "--json", "--cache-folder", tmp_path).stdout)
        for _ in range(2)
    ]
    assert [run["text"] for run in runs] == [ANSWER, ANSWER]
    first, second = (run["time_to_first_token"] for run in runs)
    assert first["first_ask"] > first["next_ask"] > 0
    assert second["first_ask"] is None and runs[1]["timings"]["vision"] == 0


def test_an_attention_picture(tmp_path: Path) -> None:
    run = run_command("ppllava-run", SAMPLE, QUESTION, "--save-attention", tmp_path / "map.png")
    assert run.returncode == 0, run.stderr
    assert os.listdir(tmp_path) == ["map.png"]
    picture = np.asarray(Image.open(tmp_path / "map.png"))
    assert picture.ndim == 3 and picture.shape[0] > 400 and picture.std() > 5


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_an_attention_film(tmp_path: Path, suffix: str) -> None:
    """One picture a frame; the strip below is brightest where the cross is shown."""
    path = tmp_path / f"film.{suffix}"
    run = run_command("ppllava-run", SAMPLE, "What color is the cross?", "--save-attention", path)
    assert run.returncode == 0 and run.stdout == "yellow\n", run.stderr
    assert os.listdir(tmp_path) == [path.name]
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(pictures) == 8 and pictures[0].shape == (466, 360, 3)
    strips = [picture[-60:] for picture in pictures]
    bright = [int(((s[..., 0] > 200) & (s[..., 2] < 90)).sum()) for s in strips]  # the present frame's bar
    assert set(np.argsort(bright)[-2:]) == {3, 4} and bright[3] > 5 * bright[0]


def test_an_attention_film_that_cannot_be_written(tmp_path: Path) -> None:
    for name in ("film.avi", "nothing/film.mp4"):
        run = run_command("ppllava-run", SAMPLE, QUESTION, "--save-attention", tmp_path / name)
        assert run.returncode == 2 and "Traceback" not in run.stderr
        assert run.stderr.splitlines()[-1].startswith("error: ")
    assert os.listdir(tmp_path) == []


def test_images_folders_and_ranges(tmp_path: Path) -> None:
    with av.open(str(SAMPLE)) as container:
        frames = [f.to_image() for f in container.decode(video=0)]
    frames[10].save(tmp_path / "still.png")
    (tmp_path / "folder").mkdir()
    for i, frame in enumerate(frames[::5]):
        frame.save(tmp_path / "folder" / f"{i}.png")
    for source in (tmp_path / "folder", SAMPLE):
        run = run_command("ppllava-run", source, QUESTION)
        assert run.stdout == f"{ANSWER}\n", (source, run.stderr)
    assert run_command("ppllava-run", tmp_path / "still.png", QUESTION).returncode == 0
    run = run_command("ppllava-run", SAMPLE, QUESTION, "--start", "0.5", "--end", "1.5", "--json")
    ranged = json.loads(run.stdout)
    assert ranged["frame_times"][0] >= 0.45 and ranged["frame_times"][-1] <= 1.55


def test_sampling_and_stop_strings() -> None:
    hot = ["--temperature", "3", "--seed", "7", "--max-new-tokens", "12"]
    runs = [run_command("ppllava-run", SAMPLE, "Describe the video.", *hot).stdout for _ in range(2)]
    assert runs[0] == runs[1]
    whole = run_command("ppllava-run", SAMPLE, "Describe the video.").stdout.strip()
    word = whole.split()[2]
    cut = json.loads(
        run_command("ppllava-run", SAMPLE, "Describe the video.", "--stop", word, "--json").stdout
    )
    assert cut["finish"] == "stop string" and cut["text"] == whole[: whole.index(word)].rstrip()


def test_a_bundle_with_tokenizers_made_by_the_exporter(tiny_bundle: Path, video_file: Path) -> None:
    """Random weights give nonsense, but the same nonsense every time, in whole characters."""
    options = ("--model", tiny_bundle, "--max-new-tokens", "24", "--json")
    runs = [run_command("ppllava-run", video_file, "Was ist das? 東京", *options) for _ in range(2)]
    first, second = (json.loads(run.stdout) for run in runs)
    assert first["text"] == second["text"] and 1 <= first["new_tokens"] <= 24
    assert "tiny demonstration" not in runs[0].stderr
