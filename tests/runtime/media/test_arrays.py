"""Frames that the app passes in memory: their colours, their times, and what can't be a frame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ppllava_edge import VideoQA
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.encoding.encode_source import reader_of
from ppllava_edge.runtime.media.arrays import ArrayReader, rgb_frame
from ppllava_edge.runtime.media.limits import MediaLimits
from ppllava_edge.runtime.session.video import Video
from ppllava_edge.runtime.vision.frame_options import FrameOptions

QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def qa() -> Iterator[VideoQA]:
    """Nano on the CPU."""
    with VideoQA(device="cpu") as qa:
        yield qa


@pytest.fixture
def images(moving_frames: np.ndarray) -> list[np.ndarray]:
    """Eight RGB frames."""
    return [np.ascontiguousarray(frame) for frame in moving_frames[:8]]


def _grey(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[:, :, 0])


@pytest.mark.parametrize("color", ["rgb", "bgr", "rgba", "bgra"])
def test_every_order_of_colours_gives_the_same_features(
    qa: VideoQA, images: list[np.ndarray], color: str
) -> None:
    order = {"r": 0, "g": 1, "b": 2}
    planes = [np.dstack([image, np.full(image.shape[:2], 7, np.uint8)]) for image in images]
    given = [np.ascontiguousarray(p[:, :, [order.get(c, 3) for c in color]]) for p in planes]
    video, same = qa.open(given, fps=5, color=color), qa.open(images, fps=5)
    np.testing.assert_array_equal(np.asarray(video.features), np.asarray(same.features))
    np.testing.assert_array_equal(video.pictures([3])[0], images[3])


def test_grey_frames(qa: VideoQA, images: list[np.ndarray]) -> None:
    grey = [_grey(image) for image in images]
    same = qa.open([np.repeat(g[:, :, None], 3, 2) for g in grey], fps=5)
    for given in (grey, [g[:, :, None] for g in grey], np.stack(grey)):
        video = qa.open(given, fps=5, color="gray")
        np.testing.assert_array_equal(np.asarray(video.features), np.asarray(same.features))
        assert video.pictures([0])[0].shape == (96, 128, 3)


@pytest.mark.parametrize(
    ("image", "color", "words"),
    [
        (np.zeros((32, 32), np.uint8), "rgb", "color='gray'"),
        (np.zeros((32, 32, 4), np.uint8), "rgb", "color='rgba' or 'bgra'"),
        (np.zeros((32, 32, 3), np.uint8), "gray", "color='rgb' or 'bgr'"),
        (np.zeros((3, 32, 32), np.uint8), "rgb", "channels come first"),
        (np.zeros((32, 32, 3), np.float32), "rgb", "by 255"),
        (np.zeros((32, 32, 3), np.uint16), "rgb", "convert it to uint8"),
        (np.zeros((32, 32, 3), bool), "rgb", "convert it to uint8"),
        (np.zeros((2, 32, 32, 3), np.uint8), "rgb", "one by one"),
        (np.zeros((32, 32, 2), np.uint8), "rgb", "uint8"),
        (np.zeros((0, 0, 3), np.uint8), "rgb", "too small"),
        (np.zeros((32, 32, 3), np.uint8), "yuv", "color must be"),
        (np.zeros((32, 32, 3), np.uint8), None, "color must be"),
        (np.array([[object()]]), "rgb", "not a frame"),
        ("a picture", "rgb", "is not a frame|must be"),
        ([[1, 2], [3]], "rgb", "not an array"),
        (None, "rgb", "not a frame"),
    ],
)
def test_what_is_no_frame_is_refused_with_a_hint(image: Any, color: Any, words: str) -> None:
    with pytest.raises(MediaError, match=words) as caught:
        rgb_frame(image, "frame 3", color)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [42, None, 1.5, {}, [], (), iter([]), np.zeros((0, 32, 32, 3), np.uint8)])
def test_what_is_no_source(qa: VideoQA, source: Any) -> None:
    with pytest.raises(MediaError, match=r"not|no frames|isn't"):
        qa.open(source)


def test_times_are_the_apps(qa: VideoQA, images: list[np.ndarray]) -> None:
    times = [100.0, 100.5, 101.0, 103.0, 103.0, 110.0, 111.5, 112.0]
    video = qa.open(images, times=times)
    assert video.frames.times == times and video.frames.indices == list(range(8))
    assert video.frames.notes == []
    moments = video.ask(QUESTION).moments
    assert moments and all(100 <= moment.seconds <= 112 for moment in moments)
    assert qa.open(images, fps=4).frames.times == [i / 4 for i in range(8)]
    assert qa.open(tuple(images), times=np.arange(8) / 2).frames.fps == pytest.approx(2)


def test_without_times_a_note_says_what_the_times_are(qa: VideoQA, images: list[np.ndarray]) -> None:
    video = qa.open(images)
    assert video.frames.times == [float(i) for i in range(8)]
    assert video.ask(QUESTION).notes == [
        "the frames came without times or fps: their times are their numbers"
    ]


def test_start_and_end_choose_by_the_apps_times(qa: VideoQA, images: list[np.ndarray]) -> None:
    times = [10.0, 11, 12, 13, 14, 15, 16, 17]
    video = qa.open(images, start=11.5, end=15, times=times)
    assert video.frames.indices == [2, 3, 4, 5] and video.frames.times == [12, 13, 14, 15]
    assert qa.open(images, start=1.0, fps=4).frames.indices == [4, 5, 6, 7]
    with pytest.raises(MediaError, match="from 10 to 17 s"):
        qa.open(images, start=20, times=times)
    with pytest.raises(MediaError, match="give times or fps"):
        qa.open(images, start=1)
    for bound in (float("nan"), float("inf"), "soon"):
        with pytest.raises(MediaError):
            qa.open(images, end=bound, times=times)  # type: ignore[arg-type]


def test_a_number_of_frames(qa: VideoQA, moving_frames: np.ndarray) -> None:
    times = [2.0 * i for i in range(24)]
    assert qa.open(moving_frames, frames=6, times=times).frames.indices == [1, 5, 9, 13, 16, 20]
    chosen = qa.open(moving_frames, frames=4, start=10, end=24, times=times).frames
    assert len(chosen.indices) == 4 and min(chosen.indices) >= 5 and max(chosen.indices) <= 12
    assert chosen.count == 24
    assert len(qa.open(moving_frames, frames="auto", times=times).frames.indices) == _auto(qa, 48)
    assert len(qa.open(moving_frames, frames="auto", start=0, end=2, times=times).frames.indices) == _auto(
        qa, 4
    )
    for frames in (0, -1, 10**6):
        with pytest.raises(MediaError, match="frames"):
            qa.open(moving_frames, frames=frames, fps=1)


def _auto(qa: VideoQA, seconds: float) -> int:
    """How many frames "auto" takes of a file of this duration."""
    reader = ArrayReader([np.zeros((16, 16, 3), np.uint8)] * 2, fps=2 / seconds)
    return FrameOptions("auto").count(qa.pipeline.manifest, reader)


def _guided(qa: VideoQA, source: Any, **options: Any) -> Video:
    return qa.open(source, select="guided", candidates=16, **options)


def test_the_question_chooses_among_the_apps_frames(qa: VideoQA, moving_frames: np.ndarray) -> None:
    video = _guided(qa, moving_frames, frames=6, fps=12)
    answer = video.ask(QUESTION)
    assert len(answer.frame_indices) == 6 and len(video.frames.indices) == 16
    assert answer.frame_times == pytest.approx([i / 12 for i in answer.frame_indices], abs=0.001)
    few = _guided(qa, moving_frames[:6], frames=6, fps=12)
    assert few.ask(QUESTION).frame_indices == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"times": [0, 1, 2]}, "3 times, 8 frames"),
        ({"times": [0, 1, 2, 3, 4, 5, 7, 6]}, r"times\[7\] = 6 follows 7"),
        ({"times": [0, 1, 2, 3, 4, 5, 6, float("nan")]}, r"times\[7\] is nan"),
        ({"times": ["0"] * 8}, "must be seconds"),
        ({"times": 5.0}, "sequence of times"),
        ({"times": range(8), "fps": 2}, "not both"),
        ({"fps": 0}, "fps must be"),
        ({"fps": float("inf")}, "fps must be"),
        ({"fps": "25"}, "fps must be"),
        ({"color": "yuv"}, "color must be"),
    ],
)
def test_times_that_fit_nothing(
    qa: VideoQA, images: list[np.ndarray], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(MediaError, match=words):
        qa.open(images, **options)


@pytest.mark.parametrize("options", [{"fps": 5}, {"times": [0.0]}, {"color": "bgr"}])
def test_options_of_frames_are_refused_for_files(qa: VideoQA, video_file: Any, options: Any) -> None:
    with pytest.raises(MediaError, match="for frames in memory"):
        qa.open(video_file, **options)


@pytest.mark.parametrize(
    ("shape", "color"), [((64, 64, 3), "rgb"), ((64, 64, 4), "bgra"), ((64, 64), "gray")]
)
def test_a_single_frame_is_no_list(shape: tuple[int, ...], color: str) -> None:
    with pytest.raises(MediaError, match=r"pass a list: \[frame\]"):
        ArrayReader(np.zeros(shape, np.uint8), color=color)


def test_names_of_files_are_no_frames() -> None:
    with pytest.raises(MediaError, match="frame 0 is not a frame: rgb needs a uint8 array"):
        ArrayReader(["a.png", "b.png"])


def test_a_list_that_changes_while_it_is_read(images: list[np.ndarray]) -> None:
    given = list(images)
    reader = reader_of(given, FrameOptions(), fps=1.0)
    frames = reader.frames(lambda r: range(r.count))
    next(frames)
    given.clear()
    assert len(list(frames)) == 7


def test_an_endless_iterator_is_refused() -> None:
    def endless() -> Iterator[np.ndarray]:
        while True:
            yield np.zeros((16, 16, 3), np.uint8)

    with pytest.raises(MediaError, match="more than 50 frames"):
        ArrayReader(endless(), limits=MediaLimits(max_files=50))


def test_limits_hold_for_frames_in_memory(images: list[np.ndarray]) -> None:
    with pytest.raises(MediaError, match="too large"):
        ArrayReader(images, limits=MediaLimits(max_side=100))


def test_frames_whose_errors_say_nothing_and_colors_that_are_no_text() -> None:
    class Silent:
        def __dlpack__(self, **options: object) -> None:
            raise BufferError

    with pytest.raises(MediaError, match="frame 0 can't be read through DLPack: BufferError"):
        rgb_frame(Silent(), "frame 0")
    with pytest.raises(MediaError, match="color must be"):
        rgb_frame(np.zeros((8, 8, 3), np.uint8), "frame 0", ["rgb"])  # type: ignore[arg-type]
