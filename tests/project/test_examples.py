"""Every example runs as its first lines say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import ROOT
from helpers.stream_server import StreamServer

SAMPLE = ROOT / "nano" / "sample" / "shapes.mp4"


def run(name: str, *arguments: object, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home or ROOT), "XDG_CACHE_HOME": str(home or ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment if home else None,
    )


def test_ask_a_file() -> None:
    done = run("ask_a_file.py", SAMPLE, "What color is the circle?", "How many objects are there?")
    assert done.returncode == 0, done.stderr
    assert (
        "What color is the circle? red\n" in done.stdout
        and "How many objects are there? three\n" in done.stdout
        and "ms to the first token" in done.stdout
    )
    assert run("ask_a_file.py", "nothing.mp4", "What?").stderr == "error: no such file: nothing.mp4\n"


def test_batch_folder(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    shutil.copy(SAMPLE, tmp_path / "videos" / "one.mp4")
    for expected in ("1 answered, 0 failed, 0 were there", "0 answered, 0 failed, 1 were there"):
        done = run(
            "batch_folder.py",
            tmp_path / "videos",
            tmp_path / "answers.jsonl",
            "What color is the circle?",
            home=tmp_path,
        )
        assert (
            done.returncode == 0
            and expected in done.stdout
            and "one.mp4: What color is the circle? red" in done.stdout
        ), done.stderr
    assert (
        len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
        and json.loads((tmp_path / "answers.jsonl").read_text())["text"] == "red"
    )
    assert list((tmp_path / "ppllava-edge" / "features").glob("*.features"))


def test_camera_alerts() -> None:
    done = run("camera_alerts.py", SAMPLE, "What color is the circle?", "red")
    assert done.returncode == 0 and "ALERT: red" in done.stdout and "camera: ended" in done.stderr, (
        done.stderr
    )


def test_camera_alerts_from_a_stream() -> None:
    def play() -> object:
        import av

        with av.open(str(SAMPLE)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        while True:
            yield from frames

    with StreamServer(play) as server:  # type: ignore[arg-type]
        process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "examples" / "camera_alerts.py"),
                server.url,
                "What color is the circle?",
                "red",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert process.stdout is not None and any("ALERT: red" in line for line in process.stdout)
        finally:
            process.kill()
            process.wait()


def test_robot_loop() -> None:
    done = run("robot_loop.py")
    found = re.search(r"(\d+) answers; the loop was late by ([\d.]+) ms", done.stdout)
    assert done.returncode == 0 and found and int(found[1]) >= 2 and ": red" in done.stdout, (
        done.stdout + done.stderr
    )


def test_opencv_frames() -> None:
    pytest.importorskip("cv2", reason="OpenCV comes with the extra `dev`")
    done = run("opencv_frames.py", SAMPLE, "What color is the circle?")
    assert done.returncode == 0 and done.stdout == "red\n", done.stderr
