"""Streams on loopback that are cut off, stall, change or never start: they are opened again."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from helpers.commands import ROOT
from helpers.stream_server import StreamServer, forever, wait_until
from ppllava_edge import MediaError, VideoQA
from ppllava_edge.runtime.live.isolated_source import IsolatedSource
from ppllava_edge.runtime.live.source import LiveSource

RTSP_SERVER = ROOT / "tests" / "helpers" / "rtsp_server.py"
QUESTION, ANSWER = "What color is the circle?", "red"


@pytest.mark.parametrize("kind", [pytest.param("mpegts", marks=pytest.mark.slow), "mpjpeg"])
def test_a_stream_that_is_cut_off_and_brought_back(qa: VideoQA, frames: np.ndarray, kind: str) -> None:
    states: list[str] = []
    with (
        StreamServer(forever(frames), kind) as server,
        qa.live(server.url, fps=10, window=32, timeout=5, on_state=lambda s, why: states.append(s)) as live,
    ):
        assert live.wait_for(10, 20), live.status
        assert live.ask(QUESTION).text == ANSWER
        server.cut()
        assert wait_until(lambda: live.status.state == "reconnecting"), live.status
        assert "127.0.0.1" in live.status.why
        assert live.ask(QUESTION).text == ANSWER, "frames from before can still be asked"
        before = live.status.encoded
        server.serve()
        assert wait_until(lambda: live.status.encoded >= before + 8), live.status
        assert live.status.state == "playing" and live.status.losses >= 1 and not live.status.why
        assert live.ask(QUESTION, last=2).text == ANSWER
        times = [f.seconds for f in live.window.frames()]
        assert times == sorted(times)
    assert states[0] == "playing" and states[-1] == "closed" and "reconnecting" in states
    assert live.status.state == "closed"


@pytest.mark.parametrize(
    ("kind", "words"),
    [("silent", "no answer in 0.5 s"), ("garbage", "can't be opened"), ("refused", "refused")],
)
def test_a_stream_that_never_starts(qa: VideoQA, frames: np.ndarray, kind: str, words: str) -> None:
    server = StreamServer(forever(frames), kind)
    server.serve()
    if kind == "refused":
        server.cut()
    with qa.live(server.url, timeout=0.5) as live:
        assert wait_until(lambda: live.status.losses >= 2), live.status
        with pytest.raises(
            MediaError, match=f"nothing was seen yet: the live view is reconnecting .*{words}"
        ):
            live.ask(QUESTION)
        began = time.monotonic()
        assert not live.wait_for(1, 0.2) and time.monotonic() - began < 2
    server.cut()


def test_a_stream_that_stalls(qa: VideoQA, frames: np.ndarray) -> None:
    with StreamServer(forever(frames), "stalls") as server, qa.live(server.url, fps=10, timeout=0.7) as live:
        assert live.wait_for(3, 20)
        assert wait_until(lambda: live.status.losses >= 1), live.status
        assert wait_until(lambda: server.clients >= 2)


def test_a_stream_that_changes_its_size(qa: VideoQA, frames: np.ndarray) -> None:
    def play() -> Any:
        while True:
            yield from frames[:20]
            yield from frames[:20, ::2, ::2]

    with StreamServer(play, "mpegts") as server, qa.live(server.url, fps=10, timeout=5) as live:
        sizes = set[Any]()

        def both_sizes_seen() -> bool:
            sizes.add(live.status.size)
            return {(216, 216), (108, 108)} <= sizes

        assert wait_until(both_sizes_seen, 30), (sizes, live.status)
        assert wait_until(lambda: len({f.picture.shape for f in live.window.frames()}) == 2)
        assert live.ask("How many objects are there?").text


@pytest.mark.slow
def test_a_stream_that_changes_its_codec(qa: VideoQA, frames: np.ndarray) -> None:
    with StreamServer(forever(frames), "mpegts") as server, qa.live(server.url, fps=10, timeout=1.5) as live:
        assert live.wait_for(5, 20)
        server.cut()
        server.codec = "mpeg2video"
        server.serve()
        before = live.status.encoded
        assert wait_until(lambda: live.status.encoded > before + 5), live.status
        assert live.ask(QUESTION, last=1).text == ANSWER


@pytest.mark.slow
def test_a_codec_that_changes_in_the_middle(qa: VideoQA, frames: np.ndarray) -> None:
    """The codec changes within one connection: a stream that can't be decoded any more is reopened."""
    with StreamServer(forever(frames), "mpegts") as server, qa.live(server.url, fps=10, timeout=1.5) as live:
        assert live.wait_for(5, 20)
        server.codec = "mpeg2video"
        time.sleep(1.0)
        before = live.status.encoded
        assert wait_until(lambda: live.status.encoded > before + 8, 30), live.status
        assert live.ask(QUESTION, last=0.8).text == ANSWER


def system_python() -> str:
    """A Python with GStreamer's RTSP server; skips the test where there is none."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None or subprocess.run([python, RTSP_SERVER], capture_output=True).returncode:
        pytest.skip(
            "no GStreamer RTSP server here (Debian: gir1.2-gst-rtsp-server-1.0 python3-gi "
            "gstreamer1.0-plugins-good gstreamer1.0-plugins-bad)"
        )
    return python


def test_an_rtsp_stream_that_is_cut_off_and_brought_back(
    qa: VideoQA, frames: np.ndarray, tmp_path: Path
) -> None:
    from ppllava_edge.runtime.media.writing import write_video

    python = system_python()
    options = {"g": "10", "preset": "veryfast"}
    clip = write_video(tmp_path / "clip.mp4", np.concatenate([frames] * 20), options=options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def serve() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [python, str(RTSP_SERVER), str(clip), str(port)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    server = serve()
    try:
        with qa.live(f"rtsp://127.0.0.1:{port}/stream", fps=10, timeout=3) as live:
            assert live.wait_for(10, 30), live.status
            assert live.ask(QUESTION, last=2).text == ANSWER
            server.kill()
            server.wait()
            assert wait_until(lambda: live.status.state == "reconnecting", 20), live.status
            before = live.status.encoded
            server = serve()
            assert wait_until(lambda: live.status.encoded >= before + 8, 30), live.status
            assert live.ask(QUESTION, last=0.7).text == ANSWER
    finally:
        server.kill()
        server.wait()


def test_passwords_are_not_shown(qa: VideoQA, caplog: pytest.LogCaptureFixture) -> None:
    with qa.live("http://admin:se@cret@127.0.0.1:9/stream?x=a@b", timeout=0.5) as live:
        assert wait_until(lambda: live.status.losses >= 1), live.status
        assert "http://***@127.0.0.1:9/stream?x=a@b" in live.status.why
        with pytest.raises(MediaError) as found:
            live.ask(QUESTION)
    with pytest.raises(MediaError) as wrong:
        qa.live("sftp://admin:se@cret@host/x")
    shown = caplog.text + str(found.value) + str(wrong.value)
    assert "trying again" in caplog.text and "cret" not in shown and "admin" not in shown


def test_logging_is_silent_unless_the_app_says_otherwise() -> None:
    code = """
import logging, sys, time
from ppllava_edge import VideoQA
if len(sys.argv) > 1:
    logging.basicConfig(level=logging.WARNING)
with VideoQA(device="cpu").live("http://127.0.0.1:9/stream") as live:
    while not live.status.losses:
        time.sleep(0.01)
"""
    silent, spoken = (
        subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True, timeout=60)
        for more in ([], ["aloud"])
    )
    assert silent.returncode == spoken.returncode == 0 and silent.stderr == silent.stdout == ""
    assert "ppllava_edge.runtime.live.reconnect" in spoken.stderr and "trying again in" in spoken.stderr


@pytest.mark.parametrize("isolate", [False, True])
def test_a_stream_that_goes_on_with_sound_only_is_lost(tmp_path: Path, isolate: bool) -> None:
    """No packet of video comes any more, but data does."""
    path = tmp_path / "sound.ts"
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg2video", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        sound: Any = container.add_stream("mp2", rate=48000)
        for i in range(5):
            image = np.full((64, 64, 3), 40 * i, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode())
        for i in range(5000):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), "s16", "mono")
            samples.sample_rate, samples.pts = 48000, i * 1152
            container.mux(sound.encode(samples))
    data, ended = path.read_bytes(), threading.Event()

    def send(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(data[: len(data) // 2])
            for i in range(len(data) // 2, len(data), 188):
                connection.sendall(data[i : i + 188])
                if ended.wait(0.01):
                    return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=send, args=(listening,), daemon=True).start()
        address = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        kind = IsolatedSource if isolate else LiveSource
        source = kind(address, lambda t: True, lambda image, t: None, timeout=1.0)
        try:
            with pytest.raises(MediaError, match="delivered no frame for 1 s"):
                source.read(threading.Event(), lambda: None)
        finally:
            ended.set()
