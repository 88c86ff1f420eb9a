"""A VideoQA's life in an app: forks, and closing."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from helpers.commands import SAMPLE
from ppllava_edge import EngineError, VideoQA

COLOUR = "What color is the circle?"


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether a condition came true."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


FORK = f"""
import gc, os, sys, traceback
from ppllava_edge import EngineError, VideoQA

qa = VideoQA(device="cpu")
video = qa.open({str(SAMPLE)!r})
video.ask("What color is the circle?")
live = qa.live(None)
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    assert video.ask("What color is the circle?").text == "red"
    sys.exit(os.waitstatus_to_exitcode(status))
calls = {{
    "open": lambda: qa.open({str(SAMPLE)!r}),
    "live": lambda: qa.live(None),
    "push": lambda: live.push(None),
    "live video": lambda: live.video(),
    "ask": lambda: video.ask("What color is the circle?"),
    "stream": lambda: next(video.stream("What color is the circle?")),
    "attention": lambda: video.attention("What color is the circle?"),
    "similarity": lambda: video.similarity("What color is the circle?"),
}}
wrong = []
for name, call in calls.items():
    try:
        call()
        wrong.append(name)
    except EngineError as error:
        if "forked" not in str(error) or "\\n" in str(error):
            wrong.append((name, error))
    except BaseException:
        traceback.print_exc()
        wrong.append(name)
print(wrong)
del qa, video, live, calls, call
gc.collect()  # destroys no engine: that would crash without its threads
sys.stdout.flush()
os._exit(1 if wrong else 7)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_told_to_load_its_own() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 7, (run.returncode, run.stdout, run.stderr)


# -- closing ----


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def stages_of(qa: VideoQA) -> list[weakref.ref[Any]]:
    """Weak references to what holds the model's memory."""
    pipeline = qa.pipeline
    held = [*itertools.chain(*pipeline._stages.built().values()), pipeline.decoder, pipeline.embedding_table]
    return [weakref.ref(thing) for thing in held]


def alive(references: list[weakref.ref[Any]]) -> list[Any]:
    return [reference() for reference in references if reference() is not None]


@pytest.fixture
def collector_off() -> Iterator[None]:
    """What is released must not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_further_use_of_a_closed_model_is_one_line() -> None:
    with VideoQA(device="cpu") as qa:
        video, chat, live = qa.open(SAMPLE), qa.open(SAMPLE, keep="tokens"), qa.live(None)
        unbegun = video.stream(COLOUR)
        assert video.ask(COLOUR).text == chat.ask(COLOUR).text == "red"
    assert qa.closed and live.closed
    frame = np.zeros((8, 8, 3), np.uint8)
    calls: list[Callable[[], Any]] = [
        lambda: qa.open(SAMPLE),
        lambda: qa.live(None),
        lambda: qa.warm_up(),
        lambda: live.push(frame),
        lambda: live.video(),
        lambda: live.ask(COLOUR),
        lambda: video.ask(COLOUR),
        lambda: chat.ask(COLOUR),
        lambda: video.attention(COLOUR),
        lambda: next(unbegun),
    ]
    for call in calls:
        with pytest.raises(EngineError, match="closed") as caught:
            call()
        assert "\n" not in str(caught.value)
    qa.close()  # again
    assert qa.memory().weights == qa.memory().caches == 0


def test_closing_releases_engines_caches_and_mapped_weights(collector_off: None) -> None:
    qa = VideoQA(device="cpu")
    video, chat = qa.open(SAMPLE), qa.open(SAMPLE, keep="tokens")
    stream = video.stream("Describe the video.")
    next(stream)
    chat.ask(COLOUR)
    held = stages_of(qa)
    qa.close()
    assert list(stream) == [] and stream.answer.finish == "cancelled"
    del stream
    assert alive(held) == []
    assert video.frames.times and chat.features is not None  # what the app holds remains


def test_a_dropped_model_is_released_at_once(collector_off: None) -> None:
    qa = VideoQA(device="cpu")
    video = qa.open(SAMPLE, keep="tokens")
    video.ask(COLOUR)
    held = [*stages_of(qa), weakref.ref(qa)]
    del qa, video
    assert alive(held) == []


def test_files_and_threads_are_back_to_what_they_were() -> None:
    def life() -> None:
        with VideoQA(device="cpu") as qa:
            live = qa.live(None)
            live.push(np.zeros((64, 64, 3), np.uint8))
            assert live.wait_for(1, 60)
            watch = live.watch(COLOUR, every=0.01)
            qa.open(SAMPLE, keep="tokens").ask(COLOUR)
        assert not watch.running

    life()  # libraries keep some files of their own
    gc.collect()
    threads, files = threading.active_count(), open_files()
    for _ in range(3):
        life()
    gc.collect()
    assert (threading.active_count(), open_files()) == (threads, files)


def test_closing_ends_what_is_under_way_and_what_waits() -> None:
    qa = VideoQA(device="cpu", parallel=1)
    video = qa.open(SAMPLE)
    stream = video.stream("Describe the video.", max_new_tokens=1000)
    next(stream)
    ends: list[Any] = []

    def ask() -> None:
        try:
            ends.append(video.ask(COLOUR))
        except EngineError as error:
            ends.append(str(error))

    waiting = [threading.Thread(target=ask) for _ in range(3)]
    for thread in waiting:
        thread.start()
    assert wait_until(lambda: qa.admission.waiting == 3)
    qa.close()
    for thread in waiting:
        thread.join(30)
    assert len(ends) == 3 and all("closed" in str(end) for end in ends), ends
    assert list(stream) == [] and stream.answer.finish == "cancelled" and qa.admission.held == 0


def test_closing_ends_a_warm_up_that_waits_for_a_slot() -> None:
    qa = VideoQA(device="cpu", parallel=1)
    stream, ends = qa.open(SAMPLE).stream(COLOUR), list[str]()
    next(stream)  # the app keeps its slot

    def warm_up() -> None:
        try:
            qa.warm_up()
        except EngineError as error:
            ends.append(str(error))

    thread = threading.Thread(target=warm_up, daemon=True)
    thread.start()
    assert wait_until(lambda: qa.admission.waiting == 1)
    qa.close()
    thread.join(30)
    assert len(ends) == 1 and "closed" in ends[0] and qa.admission.waiting == 0


@pytest.mark.parametrize("event", ["open", "answer", "frame"])
def test_closing_inside_a_callback(event: str) -> None:
    closed = threading.Event()

    def metrics(what: str, figures: dict[str, Any]) -> None:
        if what == event:
            qa.close()
            closed.set()

    qa = VideoQA(device="cpu", metrics=metrics)
    if event == "frame":
        live = qa.live(None)
        live.push(np.zeros((64, 64, 3), np.uint8))
        assert closed.wait(60) and live.closed
        return
    with contextlib.suppress(EngineError):  # "open": the video can't be asked any more
        assert qa.open(SAMPLE).ask(COLOUR).text == "red"
    assert closed.is_set() and qa.closed


def test_closing_inside_a_watch_of_a_live_view() -> None:
    qa, closed = VideoQA(device="cpu"), threading.Event()

    def on_answer(answer: Any) -> None:
        qa.close()
        closed.set()

    live = qa.live(None)
    live.push(np.zeros((64, 64, 3), np.uint8))
    assert live.wait_for(1, 60)
    watch = live.watch(COLOUR, every=0.01, on_answer=on_answer)
    assert closed.wait(60) and wait_until(lambda: not watch.running) and live.closed


def test_many_threads_may_close_while_others_ask() -> None:
    qa = VideoQA(device="cpu")
    video, chat = qa.open(SAMPLE), qa.open(SAMPLE, keep="prefix")
    wrong: list[Any] = []

    def ask(of: Any) -> None:
        try:
            while True:
                answer = of.ask(COLOUR)
                if answer.finish != "cancelled" and answer.text != "red" and of is video:
                    wrong.append(answer)
        except EngineError as error:
            if "closed" not in str(error):
                wrong.append(error)
        except Exception as error:
            wrong.append(error)

    askers = [threading.Thread(target=ask, args=(of,)) for of in (video, chat, video, chat)]
    closers = [threading.Thread(target=qa.close) for _ in range(4)]
    for thread in askers:
        thread.start()
    time.sleep(0.3)
    held = stages_of(qa)
    for thread in closers:
        thread.start()
    for thread in (*askers, *closers):
        thread.join(60)
        assert not thread.is_alive()
    gc.collect()
    assert wrong == [] and alive(held) == []


def test_closing_while_a_video_is_opened() -> None:
    qa = VideoQA(device="cpu")
    threads = threading.active_count()
    with pytest.raises(EngineError, match="closed"):
        qa.open(SAMPLE, progress=lambda *done: qa.close())
    assert wait_until(lambda: threading.active_count() <= threads)  # the one that decodes ahead has ended


@pytest.mark.parametrize("event", ["open", "answer", "frame"])
def test_a_metrics_callback_may_ask_itself(event: str) -> None:
    """With a single slot: no callback is called while its own question holds it."""
    texts: list[str] = []
    is_inside = False

    def metrics(what: str, figures: dict[str, Any]) -> None:
        nonlocal is_inside
        if what == event and not is_inside:
            is_inside = True
            texts.append(video.ask(COLOUR).text)
            is_inside = False
            raise RuntimeError("the app's own mistake")

    qa = VideoQA(device="cpu", parallel=1, queue=0)
    video = qa.open(SAMPLE)
    qa._metrics = metrics
    assert qa.open(SAMPLE).ask(COLOUR).text == "red"
    with qa.live(None) as live:
        live.push(np.zeros((64, 64, 3), np.uint8))
        assert live.wait_for(1, 60)
    assert set(texts) == {"red"} and qa.admission.held == 0


AT_EXIT = f"""
import numpy as np
from ppllava_edge import VideoQA

qa = VideoQA(device="cpu")
live = qa.live(None)
live.watch("What color is the circle?", every=0.01)
for _ in range(5):
    live.push(np.zeros((64, 64, 3), np.uint8))
stream = qa.open({str(SAMPLE)!r}).stream("Describe the video.")
next(stream)
"""


@pytest.mark.slow
def test_a_process_that_leaves_everything_open_exits_cleanly() -> None:
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0 and run.stderr == "", run.stderr
