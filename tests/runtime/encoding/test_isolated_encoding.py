"""VideoQA(isolate=True): the same answers and pictures, and no process where no file is opened."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from helpers.commands import SAMPLE, run_command
from ppllava_edge import MediaError, VideoQA
from ppllava_edge.runtime.media.isolation import reader

Children = Callable[[], set[int]]
QUESTION, DESCRIBE = "What color is the circle?", "Describe the video."


def test_answers_features_and_pictures_are_the_same(child_processes: Children) -> None:
    before = child_processes()
    plain = VideoQA(device="cpu").open(SAMPLE)
    isolated = VideoQA(device="cpu", isolate=True).open(SAMPLE)
    assert child_processes() == before, "the process ends when the video is encoded"
    np.testing.assert_array_equal(isolated.features, plain.features)
    assert isolated.ask(DESCRIBE).text == plain.ask(DESCRIBE).text
    assert isolated.frames.indices == plain.frames.indices and isolated.frames.times == plain.frames.times
    there, here = plain.pictures([1, 30]), isolated.pictures([1, 30])  # read again
    assert all(np.array_equal(a, b) for a, b in zip(there, here, strict=True))
    assert child_processes() == before


def test_guided_frames_and_images_are_the_same(tmp_path: Path, frame: np.ndarray) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(frame).save(path)
    plain, isolated = VideoQA(device="cpu"), VideoQA(device="cpu", isolate=True)
    for source, options in ((SAMPLE, {"select": "guided", "candidates": 16}), (path, {})):
        answers = [qa.open(source, **options).ask(DESCRIBE).text for qa in (plain, isolated)]  # type: ignore[arg-type]
        assert answers[0] == answers[1]


@pytest.fixture
def frame() -> np.ndarray:
    with av.open(str(SAMPLE)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def test_a_cached_video_is_read_again_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qa = VideoQA(device="cpu", isolate=True, cache=tmp_path)
    want = qa.open(SAMPLE).pictures([5])
    cached = qa.open(SAMPLE)
    np.testing.assert_array_equal(cached.pictures([5])[0], want[0])
    monkeypatch.setattr(reader, "WORKER", "no_such_worker")
    again = qa.open(SAMPLE)  # from the cache: nothing is decoded
    with pytest.raises(MediaError, match="no_such_worker"):
        again.pictures([5])


def test_frames_in_memory_start_no_process(monkeypatch: pytest.MonkeyPatch, frame: np.ndarray) -> None:
    monkeypatch.setattr(reader, "WORKER", "no_such_worker")
    qa = VideoQA(device="cpu", isolate=True)
    assert qa.open([frame] * 8).ask(QUESTION).text
    with pytest.raises(MediaError, match="no_such_worker"):
        qa.open(SAMPLE)


@pytest.mark.parametrize("name, words", [("crash", "SIGSEGV"), ("leave", "exit status 7")])
def test_a_video_whose_decoder_crashes_is_an_error(
    child_processes: Children, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    """The model answers about the next video as if nothing had happened."""
    before = child_processes()
    media = Path(__file__).parents[1] / "media"
    qa = VideoQA(device="cpu", isolate=True)
    with monkeypatch.context() as hostile:
        hostile.syspath_prepend(str(media))
        hostile.setattr(reader, "WORKER", "hostile_worker")
        with pytest.raises(MediaError, match=words):
            qa.open(f"/somewhere/{name}")
    assert qa.open(SAMPLE).ask(QUESTION).text == "red"
    assert child_processes() == before


def test_the_command_isolates(tmp_path: Path) -> None:
    run = run_command("ppllava-run", SAMPLE, QUESTION, "--isolate")
    assert run.returncode == 0 and run.stdout == "red\n", run.stderr
    (tmp_path / "text.mp4").write_text("no video" * 100)
    run = run_command("ppllava-run", tmp_path / "text.mp4", QUESTION, "--isolate")
    assert run.returncode == 2 and "is not a video" in run.stderr and "Traceback" not in run.stderr


def test_without_isolation_nothing_of_it_is_loaded() -> None:
    code = (
        "import sys\n"
        "from ppllava_edge import VideoQA\n"
        f"VideoQA(device='cpu').open({os.fspath(SAMPLE)!r})\n"
        "assert not [m for m in sys.modules if 'isolation.' in m or m == 'multiprocessing.spawn']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_error_that_is_kept_keeps_no_process(child_processes: Children) -> None:
    """An error refers to the reader, and it to its process."""
    before, kept = child_processes(), list[MediaError]()
    qa = VideoQA(device="cpu", isolate=True)
    for options in ({"frames": 4000}, {"start": 1e6}, {"select": "guided", "frames": 4000}):
        with pytest.raises(MediaError) as found:
            qa.open(SAMPLE, **options)  # type: ignore[arg-type]
        kept.append(found.value)
    assert len(kept) == 3 and child_processes() == before
