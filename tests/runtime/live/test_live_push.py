"""Frames that the app pushes: buffers, colours, threads, and the times they are said to be taken at."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.commands import SAMPLE
from helpers.stream_server import wait_until
from ppllava_edge import MediaError, VideoQA
from ppllava_edge.runtime.live.encoder import FramePacer
from ppllava_edge.runtime.live.latest_slot import LatestSlot

QUESTION, ANSWER = "What color is the circle?", "red"
HUGE = 10**400  # no float


@pytest.mark.parametrize("wait", [False, True])
def test_the_app_may_draw_into_a_pushed_frame(qa: VideoQA, frames: np.ndarray, wait: bool) -> None:
    buffer = frames[0].copy()
    with qa.live(fps=100, window=8) as live:
        with qa.engine_lock.hold():  # the encoder waits
            live.push(buffer, 0.0, wait=wait)
            buffer[:] = 0
        assert live.wait_for(1, 10)
        np.testing.assert_array_equal(live.video().pictures([0])[0], frames[0])


@pytest.mark.parametrize("color", ["bgr", "rgba", "bgra", "gray"])
@pytest.mark.parametrize("wait", [False, True])
def test_colour_orders(qa: VideoQA, frames: np.ndarray, color: str, wait: bool) -> None:
    alpha = np.full((*frames[0].shape[:2], 1), 7, np.uint8)
    image = {
        "bgr": frames[0][:, :, ::-1],
        "rgba": np.concatenate([frames[0], alpha], 2),
        "bgra": np.concatenate([frames[0][:, :, ::-1], alpha], 2),
        "gray": frames[0][:, :, 0],
    }[color].copy()
    want = np.stack([image] * 3, 2) if color == "gray" else frames[0]
    with qa.live(fps=100, window=8, color=color) as live:
        with qa.engine_lock.hold():
            live.push(image, 0.0, wait=wait)
            image[:] = 0
        assert live.wait_for(1, 10)
        np.testing.assert_array_equal(live.video().pictures([0])[0], want)
        with pytest.raises(MediaError, match="must be"):
            live.push(np.zeros((16, 16, 2), np.uint8))
        assert live.status.seen == 1


@pytest.mark.parametrize(
    "t",
    [
        float("nan"),
        float("inf"),
        float("-inf"),
        "0.5",
        b"1",
        [1.0],
        HUGE,
        True,
        1_763_000_000 * 10**9,
        1.7e12,
    ],
    ids=lambda value: str(value)[:20],
)
def test_times_that_are_none(qa: VideoQA, frames: np.ndarray, t: Any) -> None:
    with qa.live(fps=2) as live:
        assert live.push(frames[0], 0.0)
        with pytest.raises(MediaError, match=r"^t must be") as found:
            live.push(frames[0], t)
        assert "\n" not in str(found.value) and len(str(found.value)) < 120
        assert not live.push(frames[0], 0.1), "the rate is still limited"
        assert live.push(frames[0], np.float32(0.6))


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.1, 100),
    st.lists(st.one_of(st.floats(-1e11, 1e11), st.floats(0, 100), st.sampled_from([0.0, 1e11])), max_size=60),
)
def test_any_order_of_times_is_paced(fps: float, times: list[float]) -> None:
    """After a jump in either direction frames go on; within a steady stretch there are `fps` a second."""
    pacer = FramePacer(fps)
    for t in times:
        pacer.is_due(t)
    start = (times[-1] if times else 0.0) + 3 / fps
    due = sum(pacer.is_due(start + i / (10 * fps)) for i in range(200))
    if abs(start) < 1e6:  # beyond that, floats are too coarse for 100 a second
        assert 19 <= due <= 22, due


def test_times_that_go_back_keep_the_window_in_order(qa: VideoQA, frames: np.ndarray) -> None:
    with qa.live(fps=4, window=16) as live:
        for i, t in enumerate([5.0, 6.0, 7.0, 0.0, 1.0, 2.0, 100.0, 1.0, 2.0]):
            assert live.push(frames[i], t, wait=True)
        assert live.wait_for(9, 20)
        times = [frame.seconds for frame in live.window.frames()]
        assert len(times) == 9 and times == sorted(times)
        assert live.ask(QUESTION).text == ANSWER


def test_a_glitch_far_ahead_evicts_history_at_once(qa: VideoQA, frames: np.ndarray) -> None:
    with qa.live(fps=1000, window=1000, history=10.0) as live:
        for i in range(8):
            live.push(frames[i], i / 10, wait=True)
        live.push(frames[8], 1e9, wait=True)
        assert live.wait_for(9, 20)
        assert [frame.seconds for frame in live.window.frames()] == [1e9]


def test_pushing_from_several_threads(qa: VideoQA, frames: np.ndarray) -> None:
    """Every frame is counted, of any size, and those that were due are encoded or dropped."""
    clock, each = itertools.count(), 150
    with qa.live(fps=1000, window=16) as live:

        def push(stride: int) -> None:
            for i in range(each):
                live.push(frames[i % 40, ::stride, ::stride], next(clock) / 100, wait=i % 10 == 0)

        threads = [threading.Thread(target=push, args=(1 + n % 3,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert live.status.seen == 8 * each
        assert wait_until(lambda: live._encoder.pending == 0)
        times = [frame.seconds for frame in live.window.frames()]
        assert times == sorted(times) and len(times) == 16
        assert live.status.encoded + live.status.dropped <= 8 * each
        assert live.ask(QUESTION).text


def test_a_view_with_a_source_takes_no_frames(qa: VideoQA, frames: np.ndarray) -> None:
    with (
        qa.live(SAMPLE, fps=4) as live,
        pytest.raises(MediaError, match="this live view has a source"),
    ):
        live.push(frames[0])


def test_pushing_while_the_view_closes(qa: VideoQA, frames: np.ndarray) -> None:
    """A frame that waits for room is refused, not lost; nothing is kept after closing."""
    live = qa.live(fps=1000)
    results: list[bool] = []

    def push() -> None:
        results.extend(live.push(frames[0], t, wait=True) for t in (1.0, 2.0))

    with qa.engine_lock.hold():
        assert live.push(frames[0], 0.0)
        assert wait_until(lambda: not live._encoder._slot._item), "the encoder has taken it"
        thread = threading.Thread(target=push)
        thread.start()
        assert wait_until(lambda: live._encoder._slot.put_in == 2)
        closing = threading.Thread(target=live.close)
        closing.start()
        thread.join(10)
        assert not thread.is_alive()
    closing.join(10)
    assert results == [True, False]
    assert not live._encoder._slot._item and live._encoder.pending == 0


def test_a_closed_slot_takes_nothing() -> None:
    slot: LatestSlot[int] = LatestSlot()
    assert slot.put(1)
    slot.close()
    assert not slot.put(2) and slot.take() is None and slot.put_in == slot.dropped == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(
            ({"fps": value}, "fps must be")
            for value in (float("nan"), float("inf"), "2", None, -1, 1001, HUGE)
        ),
        *(({"window": value}, "window must be an integer from") for value in (2.5, "8", None, True, 10**6)),
        *(({"history": value}, "history must be") for value in (0, float("nan"), float("inf"), "60")),
        *(
            ({"timeout": value}, "timeout must be")
            for value in (0, float("nan"), float("inf"), None, "1", 1e300)
        ),
        *(({"color": value}, "color must be rgb, bgr") for value in ("RGB", "yuv", None, 3)),
        *(({"on_state": value}, "on_state must be a function") for value in ("print", 1)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_impossible_views(qa: VideoQA, options: dict[str, Any], words: str) -> None:
    threads = threading.active_count()
    with pytest.raises(MediaError, match=words) as found:
        qa.live(**options)
    assert "\n" not in str(found.value) and "--" not in str(found.value)
    assert threading.active_count() <= threads


@pytest.mark.parametrize(
    "call",
    [
        lambda live: live.wait_for("1"),
        lambda live: live.wait_for(-1),
        lambda live: live.wait_for(1, float("nan")),
        lambda live: live.wait_for(1, "2"),
        lambda live: live.video(last=float("nan")),
        lambda live: live.video(last="2"),
        lambda live: live.video(frames=0),
        lambda live: live.video(frames=2.5),
        lambda live: live.video(frames="4"),
        lambda live: live.ask(QUESTION, wait=float("nan")),
        lambda live: live.ask(QUESTION, wait="2"),
    ],
)
def test_impossible_arguments(pushed: Any, call: Callable[[Any], Any]) -> None:
    with pytest.raises(MediaError, match="must be") as found:
        call(pushed)
    assert "\n" not in str(found.value)


def test_very_long_waits_are_waits(pushed: Any) -> None:
    assert pushed.wait_for(1, 1e300) and pushed.ask(QUESTION, wait=1e300).text == ANSWER


def test_the_age_counts_from_opening_before_the_first_frame(qa: VideoQA, frames: np.ndarray) -> None:
    with qa.live() as live:
        time.sleep(0.02)
        status = live.status
        assert 0.02 <= status.age < 60 and status.lag == 0 and status.size is None
        live.push(frames[0])
        assert live.wait_for(1, 20) and live.status.lag > 0
