"""The embedding API: VideoQA, Video, Answer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.commands import SAMPLE
from ppllava_edge import MediaError, PromptError, VideoQA
from ppllava_edge.runtime.language.sampling import Sampling
from ppllava_edge.runtime.pipeline.factory import Pipeline
from ppllava_edge.runtime.vision.preprocess import preprocess_video


@pytest.fixture(scope="module")
def qa() -> VideoQA:
    return VideoQA(device="cpu")


def test_streamed_pieces_add_up_to_the_answer(qa: VideoQA) -> None:
    video = qa.open(SAMPLE)
    stream = video.stream("Describe the video.")
    pieces = list(stream)
    assert (
        len(pieces) > 3
        and "".join(pieces).rstrip() == stream.answer.text == video.ask("Describe the video.").text
    )


@pytest.mark.parametrize("numbers", [[40], [-1], ["a"], [10**30]])
def test_pictures_of_frames_that_do_not_exist(qa: VideoQA, numbers: list[Any]) -> None:
    video = qa.open(SAMPLE)
    with pytest.raises(MediaError, match=r"there is no frame .* 0 to 39"):
        video.pictures(numbers)


def test_only_the_first_question_pays_for_the_video(qa: VideoQA) -> None:
    video = qa.open(SAMPLE)
    first, second = video.ask("What color is the circle?"), video.ask("What color is the circle?")
    assert first.timings["vision"] > 0 and second.timings["vision"] == 0 and first.text == second.text


def test_closing_a_stream_ends_it(qa: VideoQA) -> None:
    stream = qa.open(SAMPLE).stream("Describe the video.")
    first = next(stream)
    stream.close()
    assert stream.answer.text == first.rstrip() and list(stream) == []
    unfinished = qa.open(SAMPLE).stream("Describe the video.")
    with pytest.raises(PromptError, match="not finished"):
        _ = unfinished.answer


def test_frames_from_the_app(qa: VideoQA) -> None:
    read = qa.open(SAMPLE).frames
    video = qa.open(read.images)
    assert video.ask("What color is the circle?").text == "red"
    np.testing.assert_allclose(video.features, qa.open(SAMPLE).features, atol=1e-4)
    with pytest.raises(MediaError, match="RGB uint8"):
        qa.open([read.images[0].astype(np.float32)])
    with pytest.raises(MediaError, match="no frames"):
        qa.open([])
    with pytest.raises(MediaError, match="at most 8"):
        qa.open([read.images[0]] * 9)


def test_questions_from_several_threads_get_the_serial_answers(qa: VideoQA) -> None:
    videos = [qa.open(SAMPLE), qa.open(SAMPLE, end=1.0)]
    questions = ["What color is the circle?", "Describe the video.", "How many objects are there?"]
    want = {(i, q): v.ask(q).text for i, v in enumerate(videos) for q in questions}
    got: dict[tuple[int, str], str] = {}

    def work(i: int, q: str) -> None:
        got[i, q] = videos[i].ask(q).text

    threads = [threading.Thread(target=work, args=key) for key in want for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == want


def test_sampling_reaches_the_decoder(qa: VideoQA) -> None:
    video = qa.open(SAMPLE)
    answers = {
        video.ask("Describe the video.", 12, Sampling(temperature=4.0, seed=seed)).text for seed in range(4)
    }
    assert len(answers) > 1


def test_metrics_of_opening_and_answering() -> None:
    events: list[tuple[str, dict[str, Any]]] = []

    def broken(event: str, figures: dict[str, Any]) -> None:
        events.append((event, figures))
        raise RuntimeError("the app's own mistake")

    answer = VideoQA(device="cpu", metrics=broken).open(SAMPLE).ask("What color is the circle?")
    (opened, opening), (answered, figures) = events
    assert (opened, answered) == ("open", "answer") and opening["frames"] == 8 and not opening["cached"]
    assert (
        opening["vision"] == figures["vision"] == answer.timings["vision"]
        and figures["new_tokens"] == answer.new_tokens
    )


# -- identities ----


def test_pooling_window_by_window_equals_pooling_at_once(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ppllava_edge.runtime.pipeline import cpu as module

    p = Pipeline.open(tiny_bundle)
    features = p.encode_frames(np.random.default_rng(0).standard_normal((9, 3, 84, 84)).astype(np.float32))
    q = p.encode_question(np.array([[256, 70, 71, 257]]))
    whole = p.visual_tokens(features, q)
    monkeypatch.setattr(module, "POOLING_BYTES", 1)
    np.testing.assert_allclose(p.visual_tokens(features, q), whole, atol=1e-6)


def test_frames_may_be_encoded_as_they_arrive(tiny_bundle: Path) -> None:
    p = Pipeline.open(tiny_bundle)
    pixels = np.random.default_rng(1).standard_normal((7, 3, 84, 84)).astype(np.float32)
    one_by_one = np.concatenate([p.encode_trunk(pixels[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(p.branch(one_by_one), p.encode_frames(pixels), atol=1e-5)


def test_the_runtime_agrees_with_the_original_algorithm_in_torch(
    tiny_checkpoint: Path, tiny_bundle: Path, video_file: Path
) -> None:
    torch = pytest.importorskip(
        "torch",
        reason="needs the extra `peers`; elsewhere the golden arrays stand for it",
    )
    from ppllava_edge.bench.models.torch_eager import TorchModel, answer
    from ppllava_edge.runtime.language.text_processor import TextProcessor
    from ppllava_edge.runtime.vision.frame_choice import read_frames

    p = Pipeline.open(tiny_bundle)
    text, images = TextProcessor(p.bundle), read_frames(video_file, 8).images
    pixels, ids = preprocess_video(images, p.manifest.preprocessing), text.question_ids("What moves?")[0]
    before, after = text.prompt_pieces("What moves?")
    theirs, _ = answer(
        TorchModel(tiny_checkpoint),
        torch.from_numpy(pixels),
        torch.from_numpy(ids),
        torch.tensor(before),
        torch.tensor(after),
        12,
    )
    visual = p.visual_tokens(p.encode_frames(pixels), p.encode_question(ids))
    embeds = np.concatenate([p.embed_tokens(before), visual, p.embed_tokens(after)])
    assert list(p.generate(embeds, 12)) == theirs
