"""The commands, end to end, on real files, as a user types them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.commands import SAMPLE, assert_one_line_error, run_command

QUESTION, ANSWER = "What color is the circle?", "red"


def test_the_demonstration_answers() -> None:
    run = run_command("ppllava-run", SAMPLE, QUESTION)
    assert run.returncode == 0 and run.stdout == f"{ANSWER}\n", run.stderr
    assert "tiny demonstration model" in run.stderr and "ppllava-export" in run.stderr


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
    assert (
        answers[0]["timings"]["vision"] > 0
        and answers[1]["timings"]["vision"] == answers[1]["timings"]["video_decode"] == 0
    )


def test_an_attention_picture(tmp_path: Path) -> None:
    run = run_command("ppllava-run", SAMPLE, QUESTION, "--save-attention", tmp_path / "map.png")
    assert run.returncode == 0, run.stderr
    assert os.listdir(tmp_path) == ["map.png"]
    picture = np.asarray(Image.open(tmp_path / "map.png"))
    assert picture.ndim == 3 and picture.shape[0] > 400 and picture.std() > 5


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_an_attention_film(tmp_path: Path, suffix: str) -> None:
    """One picture a frame: the question above, the frame, and a strip that is highest where the cross is there."""
    import av

    path = tmp_path / f"film.{suffix}"
    run = run_command("ppllava-run", SAMPLE, "What color is the cross?", "--save-attention", path)
    assert run.returncode == 0 and run.stdout == "yellow\n" and os.listdir(tmp_path) == [path.name], (
        run.stderr
    )
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(pictures) == 8 and pictures[0].shape == (466, 360, 3)
    bright = [
        int(((p[-60:, :, 0] > 200) & (p[-60:, :, 2] < 90)).sum()) for p in pictures
    ]  # the present frame's bar
    assert set(np.argsort(bright)[-2:]) == {3, 4} and bright[3] > 5 * bright[0]


def test_an_attention_film_that_cannot_be_written(tmp_path: Path) -> None:
    for name in ("film.avi", "nothing/film.mp4"):
        run = run_command("ppllava-run", SAMPLE, QUESTION, "--save-attention", tmp_path / name)
        assert (
            run.returncode == 2
            and run.stderr.splitlines()[-1].startswith("error: ")
            and "Traceback" not in run.stderr
        )
    assert os.listdir(tmp_path) == []


def test_images_folders_and_ranges(tmp_path: Path) -> None:
    import av

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
    ranged = json.loads(
        run_command("ppllava-run", SAMPLE, QUESTION, "--start", "0.5", "--end", "1.5", "--json").stdout
    )
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
    """Random weights talk nonsense; the same nonsense every time, in whole characters."""
    runs = [
        run_command(
            "ppllava-run",
            video_file,
            "Was ist das? 東京",
            "--model",
            tiny_bundle,
            "--max-new-tokens",
            "24",
            "--json",
        )
        for _ in range(2)
    ]
    first, second = (json.loads(run.stdout) for run in runs)
    assert first["text"] == second["text"] and 1 <= first["new_tokens"] <= 24
    assert "tiny demonstration" not in runs[0].stderr


def test_info_and_its_json(tiny_bundle: Path) -> None:
    assert "clip-llama" in run_command("ppllava-info", tiny_bundle).stdout
    found = json.loads(run_command("ppllava-info", tiny_bundle, "--json").stdout)
    assert found["manifest"]["pooling"]["video"]["kernel"] == [2, 3, 3] and found["bytes"] > 0
    assert run_command("ppllava-info").returncode == 0


def test_info_notices_graphs_of_another_shape(tiny_bundle: Path, golden_bundle: Path, tmp_path: Path) -> None:
    """A bundle whose hashes are right but whose parts don't belong together."""
    import hashlib

    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "mixed"))
    manifest = json.loads((copy / "manifest.json").read_text())
    for name in ("decoder.onnx", "decoder.onnx.data"):
        shutil.copy(golden_bundle / name, copy / name)
    for name in manifest["files"]:
        data = (copy / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert_one_line_error(run_command("ppllava-info", copy), "decoder.onnx", "the manifest promises")


def test_bench(tmp_path: Path) -> None:
    run = run_command("ppllava-bench", "--runs", "2", "--warmup", "1", "--new-tokens", "4", "--json")
    found = json.loads(run.stdout)
    assert (
        found["tokens_per_second"] > 0
        and found["peak_memory_bytes"] > 1e6
        and found["cold_start_seconds"] > 0
    )
    assert {"trunk", "pooling", "prefill", "decode, a token", "first token, next ask"} <= set(found["stages"])
    assert found["stages"]["prefill"]["p50"] <= found["stages"]["prefill"]["p99"]
    pytest.importorskip("matplotlib", reason="the plot needs the extra `plot`")
    run = run_command(
        "ppllava-bench", "--runs", "1", "--warmup", "0", "--new-tokens", "2", "--plot", tmp_path / "bench.png"
    )
    assert run.returncode == 0 and os.listdir(tmp_path) == ["bench.png"] and "tokens/s" in run.stdout


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.mp4", "What?"], "no such file"),
        ([SAMPLE, "   "], "question is empty"),
        ([SAMPLE, "<image>"], "question is empty"),
        ([SAMPLE, "What?", "--frames", "0"], "--frames"),
        ([SAMPLE, "What?", "--frames", "64"], "at most 8"),
        ([SAMPLE, "What?", "--start", "50"], "from 50 s on: it lasts 2.00 s"),
        ([SAMPLE, "What?", "--start", "-1"], "--start"),
        ([SAMPLE, "What?", "--end", "nan"], "--end"),
        ([SAMPLE, "What?", "--model", "nowhere"], "no bundle at nowhere"),
        ([SAMPLE, "What?", "--model", __file__], "is a file"),
        ([SAMPLE, "What?", "--max-new-tokens", "0"], "--max-new-tokens"),
        ([SAMPLE, "What?", "--temperature", "-1"], "temperature"),
        ([SAMPLE, "What?", "--template", "nonsense"], "plain_v1"),
        ([SAMPLE, "what " * 1000], "too many"),
        ([SAMPLE, "What?", "--no-such-option"], "--no-such-option"),
        ([SAMPLE, "What?", "--device", "abacus"], "abacus"),
        ([SAMPLE, "What?", "--save-attention", "/nowhere/map.png"], "/nowhere/map.png"),
        ([Path(__file__), "What?"], "not a video"),
    ],
    ids=lambda value: " ".join(map(str, value))[-40:] if isinstance(value, list) else value,
)
def test_bad_input_gets_one_line(arguments: list[str], words: str) -> None:
    run = run_command("ppllava-run", *arguments)
    if "--save-attention" in arguments:  # the answer was given before the picture failed
        assert run.returncode == 2 and words in run.stderr and "Traceback" not in run.stderr
    else:
        assert_one_line_error(run, words)


def test_cuda_without_a_card_says_so() -> None:
    run = run_command("ppllava-run", SAMPLE, QUESTION, "--device", "cuda")
    if run.returncode == 0:
        pytest.skip("this machine has a working CUDA card")
    assert_one_line_error(run, "cuda")


def test_an_ids_only_bundle_says_what_it_is(golden_bundle: Path) -> None:
    assert_one_line_error(
        run_command("ppllava-run", SAMPLE, QUESTION, "--model", golden_bundle), "--no-tokenizer"
    )


def test_a_reader_that_goes_away_is_no_error() -> None:
    """ppllava-run … | head -c 1"""
    command = f"{Path(sys.executable).with_name('ppllava-run')} {SAMPLE} 'Describe the video.' | head -c 1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert len(run.stdout) == 1 and "Traceback" not in run.stderr


def test_an_interrupt_is_quiet() -> None:
    script = Path(sys.executable).with_name("ppllava-run")
    process = subprocess.Popen(
        [script, SAMPLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(QUESTION + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == f"{ANSWER}\n"  # it waits for the next question now
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors


def test_without_an_engine_the_first_command_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not installed')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    script = Path(sys.executable).with_name("ppllava-run")
    run = subprocess.run(
        [script, SAMPLE, QUESTION], capture_output=True, text=True, env=environment, timeout=60
    )
    assert_one_line_error(run, "ppllava-edge[cpu]")
