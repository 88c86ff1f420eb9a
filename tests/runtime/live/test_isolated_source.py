"""Live sources in a child process: the same frames; a process that dies is a lost stream, opened again."""

from __future__ import annotations

import os
import signal
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.commands import SAMPLE
from helpers.encoded_clips import encode_clip
from helpers.stream_server import StreamServer, forever, wait_until
from ppllava_edge import MediaError, VideoQA
from ppllava_edge.runtime.live import isolated_source
from ppllava_edge.runtime.live.encoder import FramePacer
from ppllava_edge.runtime.live.isolated_source import IsolatedSource
from ppllava_edge.runtime.live.source import LiveSource

Children = Callable[[], set[int]]
QUESTION, ANSWER = "What color is the circle?", "red"


@pytest.fixture(scope="module")
def isolated() -> VideoQA:
    return VideoQA(device="cpu", isolate=True)


def play(kind: type[LiveSource], path: Path, fps: float, **options: Any) -> tuple[list[Any], LiveSource, int]:
    """Play a file. Returns the frames delivered, the source, and how often a frame was announced."""
    delivered: list[Any] = []
    announced: list[int] = []
    source = kind(path, FramePacer(fps).is_due, lambda image, t: delivered.append((t, image)), **options)
    source.read(threading.Event(), lambda: announced.append(1))
    return delivered, source, len(announced)


@pytest.mark.parametrize("fps", [3.0, 1000.0])
def test_a_file_gives_the_same_frames(child_processes: Children, fps: float) -> None:
    before = child_processes()
    expected, there, seen = play(LiveSource, SAMPLE, fps, realtime=False)
    found, here, announced = play(IsolatedSource, SAMPLE, fps, realtime=False)
    assert [t for t, _ in found] == [t for t, _ in expected]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))
    assert (here.seen, here.size, announced) == (there.seen, there.size, seen)
    assert child_processes() == before


def test_a_file_is_played_in_real_time(tmp_path: Path) -> None:
    path = encode_clip(tmp_path / "clip.mp4", "mpeg4", {}, frames=np.zeros((15, 32, 32, 3), np.uint8), fps=10)
    began = time.monotonic()
    found, _, _ = play(IsolatedSource, path, 1000)
    assert len(found) == 15 and time.monotonic() - began >= 1.4


def test_a_view_of_a_file(child_processes: Children, isolated: VideoQA) -> None:
    before = child_processes()
    with isolated.live(SAMPLE, fps=4, realtime=False) as live:
        assert live.wait_for(8, 60), live.status
        assert live.ask(QUESTION).text == ANSWER
        assert wait_until(lambda: live.status.state == "ended"), live.status
        assert not live.status.why
    assert child_processes() == before


def test_a_process_that_dies_is_a_lost_stream(
    child_processes: Children, isolated: VideoQA, frames: np.ndarray
) -> None:
    before = child_processes()
    with (
        StreamServer(forever(frames)) as server,
        isolated.live(server.url, fps=10, window=32, timeout=5) as live,
    ):
        assert live.wait_for(5, 30), live.status
        (pid,) = child_processes() - before
        os.kill(pid, signal.SIGSEGV)
        assert wait_until(lambda: live.status.losses == 1), live.status
        encoded = live.status.encoded
        assert wait_until(lambda: live.status.encoded >= encoded + 5), live.status
        assert live.ask(QUESTION, last=2).text == ANSWER
        times = [frame.seconds for frame in live.window.frames()]
        assert times == sorted(times)
        assert pid not in child_processes()
    assert child_processes() == before


def test_why_a_stream_cannot_be_opened_is_passed_on(isolated: VideoQA, frames: np.ndarray) -> None:
    server = StreamServer(forever(frames), "garbage")
    server.serve()
    try:
        with isolated.live(server.url, timeout=0.5) as live:
            assert wait_until(lambda: live.status.losses >= 1), live.status
            assert "can't be opened" in live.status.why and "127.0.0.1" in live.status.why
    finally:
        server.cut()
    with pytest.raises(MediaError, match="no such file"):
        isolated.live("/nowhere/clip.mp4")


def test_closing_does_not_wait_for_a_silent_process(
    child_processes: Children, isolated: VideoQA, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = child_processes()
    with StreamServer(forever(frames), "silent") as server:
        live = isolated.live(server.url, timeout=60)
        assert wait_until(lambda: child_processes() != before)
        began = time.monotonic()
        live.close()
        assert wait_until(lambda: child_processes() == before)
        assert time.monotonic() - began < 30


def test_a_process_that_stops_is_noticed(
    child_processes: Children, isolated: VideoQA, frames: np.ndarray, monkeypatch: Any
) -> None:
    """Stopped, it neither ends nor reports a timeout."""
    monkeypatch.setattr(isolated_source, "GRACE", 0.5)
    before = child_processes()
    with StreamServer(forever(frames)) as server, isolated.live(server.url, fps=10, timeout=0.5) as live:
        assert live.wait_for(3, 30), live.status
        (pid,) = child_processes() - before
        os.kill(pid, signal.SIGSTOP)
        assert wait_until(lambda: live.status.losses >= 1), live.status
        assert wait_until(lambda: pid not in child_processes())
    assert child_processes() == before


@pytest.mark.parametrize("kind", [LiveSource, IsolatedSource])
def test_a_frame_of_the_far_future_is_waited_for(tmp_path: Path, kind: type[LiveSource]) -> None:
    """Longer than the longest time that a thread can wait."""
    frames = np.zeros((6, 64, 64, 3), np.uint8)
    path = encode_clip(tmp_path / "late.mkv", "ffv1", {}, frames=frames, times=[0, 40, 80, 120, 160, 10**14])
    closed, seen = threading.Event(), list[float]()
    source = kind(path, lambda t: True, lambda image, t: seen.append(t))
    thread = threading.Thread(target=source.read, args=(closed, lambda: None))
    thread.start()
    assert wait_until(lambda: source.seen == 6) and thread.is_alive()
    closed.set()
    thread.join()
    assert len(seen) == 5


def test_a_size_that_was_refused_is_refused_again(tmp_path: Path) -> None:
    path = encode_clip(tmp_path / "large.mp4", "mpeg4", {})
    source = LiveSource(path, lambda t: True, lambda image, t: None, realtime=False)
    frame = types.SimpleNamespace(width=4, height=4)
    for _ in range(2):
        with pytest.raises(MediaError, match="too small"):
            source._count(frame)
