"""A live view of files and pushed frames: the same features as a video, clear errors, status and metrics."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.commands import SAMPLE
from helpers.stream_server import wait_until
from ppllava_edge import MediaError, VideoQA
from ppllava_edge.runtime.live.status import LiveStatus

QUESTION, ANSWER = "What color is the circle?", "red"


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (SAMPLE, {"color": "bgr"}, "color is for pushed frames"),
        (None, {"format": "v4l2"}, "are for a source"),
        (None, {"options": {"video_size": "64x64"}}, "are for a source"),
        (SAMPLE, {"options": "video_size=64x64"}, "options must be strings by name"),
        (SAMPLE, {"options": {"threads": 1}}, "options must be strings by name"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    qa: VideoQA, source: str | None, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(MediaError, match=words):
        qa.live(source, **options)


def test_file_live_and_pushed_frames_give_the_same_features(qa: VideoQA, frames: np.ndarray) -> None:
    """Bit for bit with frames encoded one by one; the opened video is encoded four frames at a time."""
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
        """The DLPack interface of torch and CuPy."""

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


def test_the_app_may_draw_into_a_pushed_frame(qa: VideoQA, frames: np.ndarray) -> None:
    buffer = frames[0].copy()
    with qa.live(fps=100, window=8) as live:
        with qa.engine_lock.hold():  # the encoder waits
            live.push(buffer, 0.0)
            buffer[:] = 0
        assert live.wait_for(1, 10)
        np.testing.assert_array_equal(live.video().pictures([0])[0], frames[0])


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
        assert wait_until(lambda: live.status.state == "ended") and "is not a video" in live.status.why
        assert not live.wait_for(1, 5)


def test_questions_without_frames_and_wrong_arguments(qa: VideoQA, frames: np.ndarray) -> None:
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


def test_metrics_and_status(frames: np.ndarray) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    qa = VideoQA(device="cpu", metrics=lambda event, figures: events.append((event, figures)))
    with qa.live(fps=4) as live:
        live.push(frames[0], 0.0)
        live.wait_for(1, 20)
        live.ask(QUESTION)
        status = live.status
    assert isinstance(status, LiveStatus) and status.as_dict()["encoded"] == 1
    assert status.size == (216, 216) and status.kept == 1
    kinds = [event for event, _ in events]
    assert kinds == ["frame", "answer", "live"] and events[1][1]["prefill"] > 0 and events[0][1]["vision"] > 0


def test_fps_may_be_changed(qa: VideoQA, frames: np.ndarray) -> None:
    with qa.live(fps=1, window=8) as live:
        assert [live.push(frames[i], i / 10) for i in range(10)].count(True) == 1
        live.fps = 10
        assert [live.push(frames[i], 1 + i / 10) for i in range(10)].count(True) >= 9
        with pytest.raises(MediaError, match="fps must be above 0"):
            live.fps = 0


def test_closing_ends_the_reader_at_once(qa: VideoQA, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing must not wait for the encoder: an unpaced file would be read to its end."""
    encode = qa.pipeline.encode_trunk

    def encode_slowly(pixels: Any, more: bool = False) -> Any:
        time.sleep(0.5)
        return encode(pixels)

    monkeypatch.setattr(qa.pipeline, "encode_trunk", encode_slowly)
    live = qa.live(SAMPLE, fps=1000, window=8, realtime=False)
    assert live.wait_for(1, 30)
    seen = live.status.seen
    live.close()
    assert live.status.seen <= seen + 2 < 40
