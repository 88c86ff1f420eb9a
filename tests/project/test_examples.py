"""Every example runs as its first lines say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import ROOT, SAMPLE
from helpers.stream_server import StreamServer

QUESTION = "What color is the circle?"


def run(name: str, *arguments: object, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run an example. home: replaces the user's home, for files that the example keeps."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "XDG_CACHE_HOME": str(home)} if home else None
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_ask_a_file() -> None:
    done = run("ask_a_file.py", SAMPLE, QUESTION, "How many objects are there?")
    assert done.returncode == 0, done.stderr
    assert "What color is the circle? red\n" in done.stdout
    assert "How many objects are there? three\n" in done.stdout
    assert "ms to the first token" in done.stdout
    assert run("ask_a_file.py", "nothing.mp4", "What?").stderr == "error: no such file: nothing.mp4\n"


def test_batch_folder(tmp_path: Path) -> None:
    videos, answers = tmp_path / "videos", tmp_path / "answers.jsonl"
    videos.mkdir()
    shutil.copy(SAMPLE, videos / "one.mp4")
    for expected in ("1 answered, 0 failed, 0 were there", "0 answered, 0 failed, 1 were there"):
        done = run("batch_folder.py", videos, answers, QUESTION, home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert "one.mp4: What color is the circle? red" in done.stdout
    lines = answers.read_text().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["text"] == "red"
    assert list((tmp_path / "ppllava-edge" / "features").glob("*.features"))


def test_camera_alerts() -> None:
    done = run("camera_alerts.py", SAMPLE, QUESTION, "red")
    assert done.returncode == 0, done.stderr
    assert "ALERT: red" in done.stdout
    assert "camera: ended" in done.stderr


def test_camera_alerts_from_a_stream() -> None:
    def play() -> Iterator[np.ndarray]:
        import av

        with av.open(str(SAMPLE)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        while True:
            yield from frames

    with StreamServer(play) as server:
        script = ROOT / "examples" / "camera_alerts.py"
        process = subprocess.Popen(
            [sys.executable, str(script), server.url, QUESTION, "red"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert any("ALERT: red" in line for line in process.stdout)
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_robot_loop() -> None:
    done = run("robot_loop.py")
    found = re.search(r"(\d+) answers; the loop was late by ([\d.]+) ms", done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found and int(found[1]) >= 2, done.stdout
    assert ": red" in done.stdout


def test_opencv_frames() -> None:
    pytest.importorskip("cv2", reason="OpenCV comes with the extra `dev`")
    done = run("opencv_frames.py", SAMPLE, QUESTION)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "red\n", done.stderr


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ask_a_file", []),
        ("batch_folder", ["videos", "o.jsonl"]),
        ("camera_alerts", [SAMPLE]),
        ("opencv_frames", [SAMPLE]),
    ],
)
def test_too_few_arguments_print_how_to_use_it(name: str, arguments: list[object]) -> None:
    if name == "opencv_frames":
        pytest.importorskip("cv2")
    done = run(f"{name}.py", *arguments)
    assert (
        done.returncode == 1
        and f"python examples/{name}.py" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_opencv_that_is_missing_or_cannot_open_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('no cv2')")
    script = str(ROOT / "examples" / "opencv_frames.py")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, script, "nothing.mp4", QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stderr == "error: this example needs OpenCV: pip install opencv-python-headless\n"
    (tmp_path / "cv2.py").write_text(
        "class VideoCapture:\n    def __init__(self, source): ...\n    def isOpened(self): return False"
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stderr == "error: OpenCV can't open nothing.mp4\n"
