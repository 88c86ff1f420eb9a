"""Live video: real streams on loopback that are cut and brought back, files in real time, frames that the app pushes."""

from __future__ import annotations

import asyncio
import json
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
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.commands import ROOT, SAMPLE, assert_one_line_error, run_command
from helpers.stream_server import StreamServer, forever, wait_until
from ppllava_edge import MediaError, VideoQA
from ppllava_edge.runtime.live import source as live_source
from ppllava_edge.runtime.live.view import LiveStatus
from ppllava_edge.runtime.live.window import LatestSlot, LiveFrame, Window, evenly_spaced

RTSP_SERVER = ROOT / "tests" / "helpers" / "rtsp_server.py"
QUESTION, ANSWER = "What color is the circle?", "red"


@pytest.fixture(scope="module")
def qa() -> VideoQA:
    return VideoQA(device="cpu")


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    with av.open(str(SAMPLE)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_source, "BACK_OFF", (0.05, 0.1, 0.2))


# -- the same features, whichever way frames come -------------------------------------------------------------------------------------


def test_file_live_and_pushed_frames_give_the_same_features(qa: VideoQA, frames: np.ndarray) -> None:
    """Bit for bit on this engine as long as frames are encoded in groups of one size; the file is encoded four frames at a time."""
    with qa.live(SAMPLE, fps=4, window=16, realtime=False) as played, qa.live(fps=4, window=16) as pushed:
        for i, frame in enumerate(frames):
            pushed.push(frame, i / 20, wait=True)
        assert played.wait_for(8, 20) and pushed.wait_for(8, 20)
        first, second = played.video(), pushed.video()
    assert first.frames.times == second.frames.times == pytest.approx([0.25 * i for i in range(8)])
    np.testing.assert_array_equal(first.features, second.features)
    opened = qa.open([frames[5 * i] for i in range(8)])
    np.testing.assert_allclose(opened.features, first.features, atol=2e-3)
    assert np.corrcoef(opened.features.ravel(), first.features.ravel())[0, 1] > 0.999999
    want = "a red circle moves right . a blue square stays still . a yellow cross appears briefly ."
    assert {video.ask("Describe the video.").text for video in (first, second, opened)} == {want}


def test_frames_from_other_libraries(qa: VideoQA, frames: np.ndarray) -> None:
    class Tensor:
        """What torch and CuPy offer."""

        def __init__(self, array: np.ndarray):
            self.array, self.shape = array, array.shape

        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.array.__dlpack_device__()

    with qa.live(fps=4, window=16) as live:
        for i in range(0, 40, 5):
            live.push(Tensor(frames[i]), i / 20, wait=True)
        assert live.wait_for(8, 20) and live.ask(QUESTION).text == ANSWER


def test_the_app_may_draw_into_a_frame_that_it_pushed(qa: VideoQA, frames: np.ndarray) -> None:
    buffer = frames[0].copy()
    with qa.live(fps=100, window=8) as live:
        with qa.engine_lock:  # the encoder waits
            live.push(buffer, 0.0)
            buffer[:] = 0
        assert live.wait_for(1, 10)
        np.testing.assert_array_equal(live.video().pictures([0])[0], frames[0])


# -- streams --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mpegts", "mpjpeg"])
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
        assert "127.0.0.1" in live.status.why and live.ask(QUESTION).text == ANSWER, (
            "what was seen can still be asked"
        )
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
    ("kind", "words"), [("silent", "can't be opened"), ("garbage", "can't be opened"), ("refused", "refused")]
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
        assert wait_until(lambda: sizes.add(live.status.size) or {(216, 216), (108, 108)} <= sizes, 30), (
            sizes,
            live.status,
        )  # type: ignore[func-returns-value]
        assert wait_until(lambda: len({f.picture.shape for f in live.window.frames()}) == 2)
        assert live.ask("How many objects are there?").text


def test_a_stream_that_changes_its_codec(qa: VideoQA, frames: np.ndarray) -> None:
    with StreamServer(forever(frames), "mpegts") as server, qa.live(server.url, fps=10, timeout=1.5) as live:
        assert live.wait_for(5, 20)
        server.cut()
        server.codec = "mpeg2video"
        server.serve()
        before = live.status.encoded
        assert wait_until(lambda: live.status.encoded > before + 5), live.status
        assert live.ask(QUESTION, last=1).text == ANSWER


def test_a_codec_that_changes_in_the_middle(qa: VideoQA, frames: np.ndarray) -> None:
    """One connection, another codec: what can't be decoded any more is opened again."""
    with StreamServer(forever(frames), "mpegts") as server, qa.live(server.url, fps=10, timeout=1.5) as live:
        assert live.wait_for(5, 20)
        server.codec = "mpeg2video"
        time.sleep(1.0)
        before = live.status.encoded
        assert wait_until(lambda: live.status.encoded > before + 8, 30), live.status
        assert live.ask(QUESTION, last=0.8).text == ANSWER


def test_a_file_is_played_in_real_time_and_ends(qa: VideoQA) -> None:
    began = time.monotonic()
    with qa.live(SAMPLE, fps=4) as live:
        assert wait_until(lambda: live.status.state == "ended")
        assert 1.7 < time.monotonic() - began < 10 and live.status.seen == 40
        assert live.wait_for(8, 5) and live.ask(QUESTION).text == ANSWER
    with pytest.raises(MediaError, match="no such file"):
        qa.live("nothing.mp4")


def test_a_broken_file_ends(qa: VideoQA, tmp_path: Path) -> None:
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 100)
    with qa.live(tmp_path / "junk.mp4") as live:
        assert wait_until(lambda: live.status.state == "ended") and "can't be opened" in live.status.why
        assert not live.wait_for(1, 5)


def system_python() -> str:
    """A Python with GStreamer's RTSP server; skips the test where there is none."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None or subprocess.run([python, RTSP_SERVER], capture_output=True).returncode:
        pytest.skip(
            "no GStreamer RTSP server here (Debian: gir1.2-gst-rtsp-server-1.0 python3-gi gstreamer1.0-plugins-good gstreamer1.0-plugins-bad)"
        )
    return python


def test_an_rtsp_stream_that_is_cut_off_and_brought_back(
    qa: VideoQA, frames: np.ndarray, tmp_path: Path
) -> None:
    from ppllava_edge.runtime.media.writing import write_video

    python, clip = (
        system_python(),
        write_video(
            tmp_path / "clip.mp4", np.concatenate([frames] * 20), options={"g": "10", "preset": "veryfast"}
        ),
    )
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


# -- at the terminal -----------------------------------------------------------------------------------------------------------------------


def test_live_at_the_terminal(frames: np.ndarray) -> None:
    run = run_command(
        "ppllava-run", "--live", SAMPLE, QUESTION, "--fps", "4", "--every", "0.4", "--last", "2"
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and len(lines) >= 3 and lines[-1].endswith(f"] {ANSWER}"), run.stderr
    assert "live: playing" in run.stderr and "live: ended" in run.stderr and "40 frames seen" in run.stderr
    with StreamServer(forever(frames)) as server:
        run = run_command(
            "ppllava-run",
            "--live",
            server.url,
            QUESTION,
            "--fps",
            "10",
            "--every",
            "0.2",
            "--answers",
            "3",
            "--json",
        )
        answers = [json.loads(line) for line in run.stdout.splitlines()]
        assert (
            len(answers) == 3 and answers[-1]["text"] == ANSWER and answers[-1]["live"]["state"] == "playing"
        )
        run = run_command(
            "ppllava-run",
            "--live",
            server.url,
            "--fps",
            "10",
            stdin=f"{QUESTION}\n\nHow many objects are there?\n",
        )
        lines = run.stdout.splitlines()
        assert len(lines) == 2 and lines[0].endswith(f"] {ANSWER}"), run.stderr


def test_what_cannot_be_watched(tmp_path: Path) -> None:
    refused = run_command("ppllava-run", "--live", "http://127.0.0.1:9/stream", QUESTION, "--no-reconnect")
    assert (
        refused.returncode == 2
        and "nothing was seen" in refused.stderr
        and "refused" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    assert_one_line_error(
        run_command("ppllava-run", "--live", tmp_path / "nothing.mp4", QUESTION), "no such file"
    )
    assert_one_line_error(
        run_command("ppllava-run", "--live", SAMPLE, QUESTION, "--frames", "4"), "--frames", "--last"
    )
    assert_one_line_error(
        run_command("ppllava-run", "--live", SAMPLE, QUESTION, "--fps", "0"), "fps must be above 0"
    )


# -- newest wins, memory stays ----------------------------------------------------------------------------------------------------------


def test_a_slow_encoder_passes_frames_over_and_never_lags(qa: VideoQA, frames: np.ndarray) -> None:
    with qa.live(fps=1000, window=16) as live:
        slow, encode = 0.03, qa.pipeline.encode_trunk
        live.qa.pipeline.encode_trunk = lambda pixels, more=False: (time.sleep(slow), encode(pixels))[1]  # type: ignore[method-assign,func-returns-value]
        try:
            lags = []
            for i in range(200):
                live.push(frames[i % 40], i / 200)
                time.sleep(0.003)
                lags.append(live.status.lag)
        finally:
            live.qa.pipeline.encode_trunk = encode  # type: ignore[method-assign]
        s = live.status
        assert s.dropped > 50 and s.encoded + s.dropped <= s.seen == 200
        assert max(lags) < 1.0, "a queue would have grown to seconds"
        newest = live.window.frames()[-1].seconds
        assert wait_until(lambda: live.window.frames()[-1].seconds >= newest)


def test_an_hour_of_frames_at_speed_leaves_memory_flat() -> None:
    from ppllava_edge.bench.live_soak import soak

    found = soak(frames=3600 * 30, fps=2, rate=30, window=32, model=None, ask_every=20_000)
    samples = found["samples"]
    early, late = (
        float(np.mean([s["memory"] for s in part]))
        for part in (samples[len(samples) // 4 : len(samples) // 2], samples[-len(samples) // 4 :])
    )
    assert late - early < 30e6, (early, late)
    assert found["encoded"] + found["dropped"] <= 7201 and found["asked"] == found["right"] == 5
    assert max(s["kept"] for s in samples) <= 32 and samples[-1]["lag"] < 2


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.lists(st.floats(0.01, 5), min_size=1, max_size=300))
def test_the_window_keeps_its_size_the_newest_and_thins_with_age(capacity: int, steps: list[float]) -> None:
    window, t = Window(capacity), 0.0
    for i, step in enumerate(steps):
        t += step
        window.add(LiveFrame(i, t, None, np.zeros(1)))
    kept = window.frames()
    assert len(kept) == min(capacity, len(steps)) and kept[-1].number == len(steps) - 1
    numbers = [f.number for f in kept]
    assert numbers == sorted(set(numbers))
    half = capacity - (capacity + 1) // 2
    assert numbers[-half:] == list(range(len(steps)))[-half:] if half and len(steps) >= half else True


def test_a_window_of_hours_still_reaches_back() -> None:
    window = Window(64)
    for i in range(100_000):
        window.add(LiveFrame(i, i / 2, None, np.zeros(1)))
    ages = [(99_999 - f.number) / 2 for f in window.frames()]
    assert len(ages) == 64 and ages[0] > 40_000 and sum(age < 20 for age in ages) >= 30
    assert sum(60 < age < 3600 for age in ages) >= 5 and sum(age > 3600 for age in ages) >= 3
    forgetful = Window(64, history=100)
    for i in range(1000):
        forgetful.add(LiveFrame(i, i / 2, None, np.zeros(1)))
    assert forgetful.frames()[0].seconds >= 399.5


@given(st.integers(1, 200), st.integers(1, 64))
def test_spread_is_even_and_ends_with_the_newest(count: int, wanted: int) -> None:
    chosen = evenly_spaced(count, wanted)
    assert len(chosen) == wanted and chosen == sorted(chosen) and chosen[-1] == count - 1 and chosen[0] >= 0
    if count >= wanted:
        assert len(set(chosen)) == wanted


def test_newest_gives_the_newest_and_counts_the_others() -> None:
    slot: LatestSlot[int] = LatestSlot()
    for i in range(5):
        slot.put(i)
    assert slot.take() == 4 and slot.dropped == 4
    taken: list[int | None] = []
    thread = threading.Thread(target=lambda: taken.append(slot.take()))
    thread.start()
    slot.close()
    thread.join(5)
    assert taken == [None]


# -- questions --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pushed(qa: VideoQA, frames: np.ndarray) -> Any:
    with qa.live(fps=4, window=16) as live:
        for i in range(0, 40, 5):
            live.push(frames[i], i / 20, wait=True)
        live.wait_for(8, 20)
        yield live


def test_only_what_a_question_needs_runs(qa: VideoQA, pushed: Any) -> None:
    first, second = pushed.ask(QUESTION), pushed.ask("How many objects are there?")
    assert first.text == ANSWER and second.text == "three"
    assert first.timings["vision"] > 0 and first.timings["video_decode"] == 0
    assert (
        pushed.ask(QUESTION, last=1.0).frame_times == [1.0, 1.25, 1.5, 1.75]
        and len(pushed.ask(QUESTION, frames=4).frame_times) == 4
    )
    again = pushed.video()
    assert again.features is pushed.video().features, (
        "no new frame: the features of the last question serve again"
    )


def test_asking_when_there_is_nothing_or_the_wrong_thing(qa: VideoQA, frames: np.ndarray) -> None:
    with qa.live() as live:
        with pytest.raises(
            MediaError, match="nothing was seen yet: the live view is playing, 0 frames arrived"
        ):
            live.ask(QUESTION)
        for wrong in (
            np.zeros((4, 4), np.uint8),
            np.zeros((9, 9, 3), np.float32),
            np.zeros((2, 2, 3), np.uint8),
            "a text",
        ):
            with pytest.raises(MediaError):
                live.push(wrong)
        live.push(frames[0])
        live.push(frames[1, :60, :80], 1.0)  # another size
        assert live.ask(QUESTION, wait=10).visual_tokens > 0, "one frame is repeated until a window is full"
        with pytest.raises(MediaError, match="last must be"):
            live.ask(QUESTION, last=-1)
        with pytest.raises(MediaError, match="at most 8"):
            live.ask(QUESTION, frames=9)
    with pytest.raises(MediaError, match="closed"):
        live.push(frames[0])
    with pytest.raises(MediaError, match="closed"):
        live.watch(QUESTION)
    live.close()
    for options in ({"fps": 0}, {"window": 1}, {"timeout": 0.0}, {"history": -1.0}):
        with pytest.raises(MediaError):
            qa.live(**options)


def test_watching(pushed: Any) -> None:
    answers: list[str] = []
    watch = pushed.watch(QUESTION, every=0.05, on_answer=lambda a: answers.append(a.text))
    assert wait_until(lambda: len(answers) >= 3)
    watch.stop()
    count = len(answers)
    time.sleep(0.2)
    assert len(answers) == count and set(answers) == {ANSWER} and not watch.running
    changes: list[str] = []
    with_changes = pushed.watch(
        QUESTION, every=0.02, on_answer=lambda a: changes.append(a.text), changes_only=True
    )
    assert wait_until(lambda: with_changes.answers >= 4)
    with_changes.stop()
    assert changes == [ANSWER]


def test_a_watch_survives_errors_and_callbacks_that_fail(qa: VideoQA, frames: np.ndarray) -> None:
    errors: list[Exception] = []

    def fails(answer: Any) -> None:
        raise RuntimeError("the app's own mistake")

    with qa.live() as live:
        watch = live.watch(QUESTION, every=0.02, on_error=errors.append, on_answer=fails)
        assert wait_until(lambda: len(errors) >= 2) and isinstance(errors[0], MediaError)
        live.push(frames[0])
        assert wait_until(lambda: watch.answers >= 2)
    assert not watch.running, "closing the view stops its watches"


def test_asyncio(pushed: Any) -> None:
    async def main() -> tuple[str, list[str], bool]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        answer = await pushed.ask_async("Describe the video.")
        watched = []
        async for found in pushed.watch_async(QUESTION, every=0.02):
            watched.append(found.text)
            if len(watched) == 3:
                break
        ticking.cancel()
        task = asyncio.create_task(pushed.ask_async("Describe the video."))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return answer.text, watched, ticks > 5

    text, watched, ticked = asyncio.run(main())
    assert text.startswith("a red circle moves right") and watched == [ANSWER] * 3 and ticked


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
    assert "ppllava_edge.runtime.live.source" in spoken.stderr and "trying again in" in spoken.stderr


def test_metrics_and_status(frames: np.ndarray) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    qa = VideoQA(device="cpu", metrics=lambda event, figures: events.append((event, figures)))
    with qa.live(fps=4) as live:
        live.push(frames[0], 0.0)
        live.wait_for(1, 20)
        live.ask(QUESTION)
        status = live.status
    assert (
        isinstance(status, LiveStatus)
        and status.as_dict()["encoded"] == 1
        and status.size == (216, 216)
        and status.kept == 1
    )
    kinds = [event for event, _ in events]
    assert kinds == ["frame", "answer", "live"] and events[1][1]["prefill"] > 0 and events[0][1]["vision"] > 0
