"""Asking again: features kept in memory and on disk, chats that keep the cache, frames that the question picks, token budgets."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.commands import SAMPLE, assert_one_line_error, run_command
from ppllava_edge import BusyError, FeatureCache, MediaError, PromptError, VideoQA
from ppllava_edge.engines.bundle.windows import Windows, within_budget
from ppllava_edge.runtime.session import encode_source as looking
from ppllava_edge.runtime.session.answer import attended_moments
from ppllava_edge.runtime.session.chat import Chat
from ppllava_edge.runtime.vision import guided_selection as selection
from ppllava_edge.runtime.vision.feature_cache import CachedVideo, content_hash
from ppllava_edge.runtime.vision.frame_choice import frames_for_length
from ppllava_edge.runtime.vision.guided_selection import choose_moments, frame_scores

QUESTION, ANSWER, DESCRIBE = "What color is the circle?", "red", "Describe the video."


@pytest.fixture(scope="module")
def qa() -> VideoQA:
    return VideoQA(device="cpu")


# -- on disk -------------------------------------------------------------------------------------------------------------------------------


def test_a_restart_answers_without_opening_the_video_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = VideoQA(device="cpu", cache=tmp_path / "cache").open(SAMPLE)
    want = first.ask(DESCRIBE)
    assert want.timings["vision"] > 0 and want.time_to_first_token["first_ask"] is not None
    monkeypatch.setattr(
        "ppllava_edge.runtime.session.reader_of", lambda *arguments: pytest.fail("the video was opened")
    )
    again = VideoQA(device="cpu", cache=tmp_path / "cache").open(SAMPLE)
    answer = again.ask(DESCRIBE)
    assert answer.text == want.text and answer.timings["vision"] == answer.timings["video_decode"] == 0
    assert (
        answer.frame_times == want.frame_times
        and answer.moments == want.moments
        and answer.time_to_first_token["first_ask"] is None
    )
    np.testing.assert_array_equal(again.features, first.features)


def test_pictures_of_a_cached_video_are_read_again(tmp_path: Path) -> None:
    from ppllava_edge.runtime.session.attention_map import attention_picture

    fresh = VideoQA(device="cpu", cache=tmp_path).open(SAMPLE)
    cached = VideoQA(device="cpu", cache=tmp_path).open(SAMPLE)
    assert cached.frames.images == [] and cached.frames.indices == fresh.frames.indices
    np.testing.assert_array_equal(attention_picture(cached, QUESTION), attention_picture(fresh, QUESTION))


def test_what_cannot_be_opened_is_said_with_a_cache_too(tmp_path: Path) -> None:
    qa = VideoQA(device="cpu", cache=tmp_path / "cache")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("nothing.mp4", "no such file"), ("pipe", "not a regular file")):
        with pytest.raises(MediaError, match=words):
            qa.open(tmp_path / name)


def test_another_video_sampling_or_bundle_is_another_entry(
    tmp_path: Path, tiny_bundle: Path, video_file: Path
) -> None:
    qa = VideoQA(device="cpu", cache=tmp_path)
    for arguments in ({}, {"frames": 6}, {"end": 1.0}, {"select": "guided", "candidates": 16}, {"tokens": 9}):
        assert qa.open(SAMPLE, **arguments).ask(QUESTION).timings["vision"] > 0, arguments  # type: ignore[arg-type]
        assert qa.open(SAMPLE, **arguments).ask(QUESTION).timings["vision"] == 0, arguments  # type: ignore[arg-type]
    assert qa.open(video_file).ask(QUESTION).timings["vision"] > 0
    assert (
        VideoQA(tiny_bundle, device="cpu", cache=tmp_path)
        .open(SAMPLE, frames=4)
        .ask("?", 1)
        .timings["vision"]
        > 0
    )
    assert len(list(tmp_path.glob("*.features"))) == 7


def test_guided_candidates_come_back_from_disk(tmp_path: Path) -> None:
    first = VideoQA(device="cpu", cache=tmp_path).open(SAMPLE, select="guided", candidates=24)
    again = VideoQA(device="cpu", cache=tmp_path).open(SAMPLE, select="guided", candidates=24)
    want, answer = first.ask("What color is the cross?"), again.ask("What color is the cross?")
    assert (
        answer.text == want.text == "yellow"
        and answer.frame_indices == want.frame_indices
        and answer.timings["vision"] == 0
    )


def test_the_content_hash_reads_two_megabytes_at_most(tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    with open(path, "wb") as file:
        file.truncate(20 << 30)  # sparse
    began = time.perf_counter()
    first = content_hash(path)
    assert time.perf_counter() - began < 2
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert content_hash(path) != first
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.png").write_bytes(b"a")
    before = content_hash(tmp_path / "folder")
    (tmp_path / "folder" / "2.png").write_bytes(b"a")
    assert content_hash(tmp_path / "folder") != before
    with pytest.raises(MediaError, match="no such file"):
        content_hash(tmp_path / "nothing")


def entry(size: int, seed: int = 0) -> CachedVideo:
    return CachedVideo(
        {"features": np.random.default_rng(seed).integers(0, 255, size, np.uint8)}, {"kind": "video"}
    )


@pytest.mark.parametrize("damage", ["truncated", "flipped", "a fact", "empty", "text", "facts", "folder"])
def test_a_damaged_entry_is_as_if_it_were_not_there(tmp_path: Path, damage: str) -> None:
    cache = FeatureCache(tmp_path)
    assert cache.store(entry(5000), "key") and cache.load("key") is not None
    path = cache.path("key")
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-100])
    elif damage == "flipped":
        data[-500] ^= 1
        path.write_bytes(data)
    elif damage == "a fact":
        path.write_bytes(data.replace(b"video", b"radio"))
    elif damage == "facts":
        path.write_bytes(data.replace(b'"facts"', b'"fakts"'))
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "text": b"nonsense" * 100}[damage])
    assert cache.load("key") is None
    if damage != "folder":
        assert not path.exists() and cache.store(entry(5000), "key") and cache.load("key") is not None


def test_an_entry_of_another_version_is_encoded_anew(tmp_path: Path) -> None:
    qa = VideoQA(device="cpu", cache=tmp_path)
    qa.open(SAMPLE)
    assert qa.cache is not None
    key = qa._cache_key(SAMPLE, looking.Look())
    found = qa.cache.load(*key)  # type: ignore[misc]
    assert found is not None
    found.facts["something new"] = 1
    qa.cache.store(found, *key)  # type: ignore[misc]
    assert qa.open(SAMPLE).ask(QUESTION).timings["vision"] > 0


def test_the_longest_unused_entries_make_room(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, limit=30_000)
    for i in range(3):
        cache.store(entry(9000, i), i)
        os.utime(cache.path(i), (i, i))
    assert cache.load(0) is not None  # used now
    assert cache.store(entry(9000, 3), 3)
    assert cache.load(1) is None and all(cache.load(i) is not None for i in (0, 2, 3))
    assert not cache.store(entry(40_000), "too large") and cache.load(0) is not None
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 30_000


def test_parts_of_crashed_processes_are_cleaned_up(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    stale, fresh = tmp_path / ".x.1.2.part", tmp_path / ".y.1.2.part"
    for path in (stale, fresh):
        path.write_bytes(b"half")
    os.utime(stale, (1, 1))
    assert cache.store(entry(10), 1) and not stale.exists() and fresh.exists(), (
        "another process may be writing the other one"
    )


def test_a_full_or_read_only_disk_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    qa = VideoQA(device="cpu", cache=tmp_path / "file" / "below")
    assert qa.open(SAMPLE).ask(QUESTION).text == ANSWER

    def full(*arguments: Any, **others: Any) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    qa = VideoQA(device="cpu", cache=tmp_path / "cache")
    assert qa.open(SAMPLE).ask(QUESTION).text == ANSWER and list((tmp_path / "cache").iterdir()) == []


def _hammer(folder: str, seed: int) -> None:
    cache, rng = FeatureCache(folder, limit=60_000), np.random.default_rng(seed)
    for _ in range(60):
        key = int(rng.integers(0, 12))
        found = cache.load(key)
        if found is not None:
            np.testing.assert_array_equal(found.arrays["features"], entry(9000, key).arrays["features"])
        else:
            cache.store(entry(9000, key), key)


def test_several_processes_share_a_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_hammer, args=(str(tmp_path), seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list(tmp_path.glob(".*.part"))


def test_the_command_line_keeps_features_too(tmp_path: Path) -> None:
    runs = [
        json.loads(run_command("ppllava-run", SAMPLE, QUESTION, "--json", "--cache-folder", tmp_path).stdout)
        for _ in range(2)
    ]
    assert [run["text"] for run in runs] == [ANSWER, ANSWER]
    first, second = (run["time_to_first_token"] for run in runs)
    assert (
        first["first_ask"] > first["next_ask"] > 0
        and second["first_ask"] is None
        and runs[1]["timings"]["vision"] == 0
    )


# -- chats -----------------------------------------------------------------------------------------------------------------------------------


def test_a_chat_reads_only_what_is_new_and_says_what_a_full_prompt_would(
    tiny_bundle: Path, video_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every turn: what the kept cache gives is what the whole conversation, read at once, gives."""
    qa = VideoQA(tiny_bundle, device="cpu")
    lengths: list[int] = []
    generate = qa.pipeline.generate

    def counted(embeds: Any, *arguments: Any) -> Any:
        lengths.append(len(embeds))
        return generate(embeds, *arguments)

    monkeypatch.setattr(qa.pipeline, "generate", counted)
    kept, whole = (qa.open(video_file, frames=8, keep="tokens") for _ in range(2))
    said = []
    for n, question in enumerate(["What moves?", "And then?", "Why is it red?"]):
        answer = kept.ask(question, max_new_tokens=9)
        chat = whole._chat
        assert chat is not None
        chat._drop()  # forgets the cache: everything is read again
        again = whole.ask(question, max_new_tokens=9)
        said.append((answer.text, again.text))
        if n:
            assert answer.timings["pooling"] == answer.timings["question"] == answer.timings["vision"] == 0
            assert lengths[-2] < 60 < lengths[-1], "the kept cache reads the new turn only"
    assert all(a == b for a, b in said), said


def test_prefix_answers_as_if_nothing_had_been_asked_before(qa: VideoQA) -> None:
    video = qa.open(SAMPLE, keep="prefix")
    first = video.ask(QUESTION)
    other = video.ask("How many objects are there?")
    assert (
        first.text == ANSWER
        and video.ask(QUESTION).text == ANSWER
        and other.visual_tokens == first.visual_tokens
    )
    assert other.timings["pooling"] == 0 and other.moments == []


def test_a_chat_goes_on_after_a_closed_answer_and_ends_at_the_context(qa: VideoQA) -> None:
    video = qa.open(SAMPLE, keep="tokens")
    stream = video.stream(DESCRIBE)
    next(stream)
    stream.close()
    assert video.ask(QUESTION, max_new_tokens=4).text is not None
    with pytest.raises(PromptError, match=r"the conversation has \d+ tokens, the model's context is 512"):
        for _ in range(100):
            video.ask(DESCRIBE, max_new_tokens=60)
    with pytest.raises(MediaError, match="keep must be"):
        qa.open(SAMPLE, keep="everything")


def test_one_question_at_a_time_in_a_chat(qa: VideoQA) -> None:
    video = qa.open(SAMPLE, keep="prefix")
    open_one = video.stream(QUESTION)
    next(open_one)
    with pytest.raises(PromptError, match="last answer is not finished"):
        video.ask(QUESTION)
    found: list[str] = []
    waiting = video.stream(QUESTION)
    thread = threading.Thread(target=lambda: found.extend(waiting))
    thread.start()
    time.sleep(0.1)
    waiting.close()
    thread.join(5)
    assert not thread.is_alive() and not found and waiting.answer.finish == "cancelled"
    errors: list[Exception] = []

    def late() -> None:
        try:
            video.ask(QUESTION, timeout=0.1)
        except BusyError as error:
            errors.append(error)

    thread = threading.Thread(target=late)
    thread.start()
    thread.join(5)
    assert "still being answered" in str(errors[0])
    open_one.close()
    assert video.ask(QUESTION).text == ANSWER and qa.admission.held == 0


def test_a_conversation_keeps_its_cache_within_its_room(qa: VideoQA) -> None:
    video = qa.open(SAMPLE, keep="tokens")
    chat = video._chat
    assert isinstance(chat, Chat)
    caches = set()
    for _ in range(4):
        video.ask(QUESTION, max_new_tokens=4)
        caches.add(id(chat.sequence))
        filled = chat.prefix + len(chat.after)
        assert filled - 1 <= chat.sequence.length <= filled
    assert len(caches) == 1


def test_a_chat_at_the_command_line() -> None:
    run = run_command("ppllava-run", SAMPLE, "--keep", "prefix", "--json", stdin=f"{QUESTION}\n{QUESTION}\n")
    first, second = (json.loads(line) for line in run.stdout.splitlines())
    assert first["text"] == second["text"] == ANSWER and second["timings"]["pooling"] == 0


# -- guided selection ------------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 16), st.integers(1, 3), st.integers(0, 100))
def test_chosen_moments_hold_the_best_one_and_are_as_many_as_asked_for(
    n: int, count: int, window: int, seed: int
) -> None:
    scores = np.random.default_rng(seed).random(n)
    chosen = choose_moments(scores, count, min(window, n))
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, n) and int(scores.argmax()) in chosen
    assert all(0 <= i < n for i in chosen)


def test_a_frame_is_worth_its_most_similar_patches() -> None:
    cosine = np.zeros((3, 9, 9), np.float32)
    cosine[1, 4, 4:6], cosine[2] = 0.9, 0.1
    assert frame_scores(cosine).argmax() == 1


def needle_clip(path: Path, seconds: int = 60, at: float = 37.0, length: float = 1.2) -> Path:
    """A red circle rests for a minute; a yellow cross is there for about a second."""
    from dataclasses import replace

    from ppllava_edge.nano.clips import sample_scene_for_the_readme
    from ppllava_edge.nano.world import STILL, VELOCITY, draw
    from ppllava_edge.runtime.media.writing import write_video

    scene = sample_scene_for_the_readme()
    scene = replace(
        scene,
        motions=np.array([STILL, STILL, STILL]),
        velocity=VELOCITY[[STILL] * 3],
        appears=np.array([0, 0, at], np.float32),
        vanishes=np.array([1e9, 1e9, at + length], np.float32),
    )
    return write_video(path, draw(scene, np.arange(seconds * 5) / 5, np.random.default_rng(0), 216)[0], fps=5)


def test_a_needle_is_found_by_guided_selection_and_missed_without(qa: VideoQA, tmp_path: Path) -> None:
    clip, question = needle_clip(tmp_path / "needle.mp4"), "What color is the cross?"
    uniform, guided = (
        qa.open(clip).ask(question),
        qa.open(clip, select="guided", candidates=120).ask(question),
    )
    assert guided.text == "yellow" != uniform.text
    assert any(37 <= t <= 38.2 for t in guided.frame_times) and not any(
        37 <= t <= 38.2 for t in uniform.frame_times
    )
    assert (
        37 <= guided.moments[0].seconds <= 38.2
        and guided.frame_times == sorted(guided.frame_times)
        and len(guided.frame_times) == 8
    )
    assert guided.timings["select"] > 0


def test_candidates_are_mapped_from_disk_when_they_are_many(
    qa: VideoQA, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = qa.open(SAMPLE, select="guided", candidates=30).ask("What color is the cross?")
    monkeypatch.setattr(selection, "IN_MEMORY", 1000)
    video = qa.open(SAMPLE, select="guided", candidates=30)
    assert video.encoded_video.candidates is not None and isinstance(
        video.encoded_video.candidates.states, np.memmap
    )
    answer = video.ask("What color is the cross?")
    assert (answer.text, answer.frame_indices) == (want.text, want.frame_indices)


def test_a_short_clip_has_nothing_to_choose_from(
    qa: VideoQA, tmp_path: Path, moving_frames: np.ndarray
) -> None:
    from ppllava_edge.runtime.media.writing import write_video

    short = write_video(tmp_path / "short.mp4", moving_frames[:5], fps=5)
    np.testing.assert_allclose(qa.open(short, select="guided").features, qa.open(short).features, atol=2e-3)
    with pytest.raises(MediaError, match="--select"):
        qa.open(SAMPLE, select="best")
    with pytest.raises(MediaError, match="--candidates"):
        qa.open(SAMPLE, select="guided", candidates=0)


def test_guided_selection_needs_guided_pooling(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "pllava"
    assert (
        run_command(
            "ppllava-export",
            tiny_checkpoint,
            "-o",
            bundle,
            "--precision",
            "fp32",
            "--pooling",
            "pllava",
            "--output-size",
            "4,2,2",
        ).returncode
        == 0
    )
    assert_one_line_error(
        run_command("ppllava-run", SAMPLE, "What?", "--model", bundle, "--frames", "4", "--select", "guided"),
        "--select guided",
        "pllava",
    )
    assert_one_line_error(
        run_command("ppllava-run", SAMPLE, "What?", "--model", bundle, "--frames", "4", "--tokens", "9"),
        "--tokens",
        "windowed pooling",
    )
    answer = VideoQA(bundle, device="cpu").open(SAMPLE, frames=4).ask("What?", 2)
    assert answer.moments == []


# -- how many frames, how many tokens ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.integers(2, 300), st.integers(3, 27), st.integers(1, 2000))
def test_windows_keep_within_the_budget(frames: int, side: int, tokens: int) -> None:
    found = within_budget(Windows((2, 3, 3), (2, 3, 3), None), (frames, side, side), tokens)
    output, kernel, stride = found.resolve((frames, side, side))
    assert 1 <= output[0] * output[1] * output[2] <= tokens and kernel == stride
    if tokens >= 2 * (side // 3) ** 2:
        assert kernel[1:] == (3, 3), "time is pooled before space"


def test_the_released_models_budget_is_its_own_windows() -> None:
    windows = Windows((2, 3, 3), (2, 3, 3), None)
    assert within_budget(windows, (32, 24, 24), 1024).kernel == (2, 3, 3)
    assert within_budget(windows, (64, 24, 24), 1024).kernel == (4, 3, 3)
    assert within_budget(windows, (256, 24, 24), 1024).kernel == (16, 3, 3)


@given(st.floats(0, 1e5), st.integers(1, 64), st.one_of(st.none(), st.integers(1, 64)), st.integers(1, 4))
def test_frames_grow_with_the_length_within_what_the_model_knows(
    duration: float, default: int, limit: int | None, step: int
) -> None:
    count = frames_for_length(duration, default, limit, step)
    assert 1 <= count <= (limit or 512) and count <= frames_for_length(duration + 100, default, limit, step)


def test_auto_frames_and_tokens(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A model without an adapter takes more frames of a longer video, and no more tokens than of a short one."""
    from ppllava_edge.runtime.media.writing import write_video

    clip = write_video(tmp_path / "long.mp4", np.zeros((130, 32, 32, 3), np.uint8), fps=1)
    bundle = tmp_path / "plain"
    assert (
        run_command(
            "ppllava-export",
            tiny_checkpoint,
            "-o",
            bundle,
            "--precision",
            "fp32",
            "--kernel",
            "2,3,3",
            "--stride",
            "2,3,3",
        ).returncode
        == 0
    )
    qa = VideoQA(bundle, device="cpu")
    m = qa.pipeline.manifest
    video = qa.open(clip, frames="auto")
    answer = video.ask("What?", 1)
    fits = frames_for_length(130, m.vision.default_frames, m.vision.max_frames, 2)
    assert len(answer.frame_indices) == fits
    own = m.pooling.video.resolve((m.vision.default_frames, *m.vision.grid))[0]
    assert answer.visual_tokens <= own[0] * own[1] * own[2]
    assert qa.open(clip, frames=8, tokens=8).ask("What?", 1).visual_tokens <= 8
    for wrong in ({"frames": "many"}, {"tokens": 0}):
        with pytest.raises(MediaError):
            qa.open(clip, **wrong)  # type: ignore[arg-type]
    assert_one_line_error(run_command("ppllava-run", SAMPLE, "What?", "--tokens", "0"), "--tokens")
    assert (
        json.loads(
            run_command(
                "ppllava-run", SAMPLE, QUESTION, "--frames", "auto", "--tokens", "18", "--json"
            ).stdout
        )["visual_tokens"]
        <= 18
    )


def test_a_token_budget_for_a_picture_that_is_read_as_a_video(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from PIL import Image

    bundle, picture = tmp_path / "npu", tmp_path / "still.png"
    made = run_command(
        "ppllava-export",
        tiny_checkpoint,
        "-o",
        bundle,
        "--precision",
        "fp32",
        "--pooling",
        "pllava_npu",
        "--output-size",
        "1,2,2",
    )
    assert made.returncode == 0, made.stderr
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
    assert VideoQA(bundle, device="cpu").open(picture, frames=4, tokens=9).ask("What?", 1).visual_tokens <= 9


def test_moments_are_the_frames_with_more_than_their_share() -> None:
    weights = np.array([0.1, 0.5, 0.05, 0.35]).reshape(4, 1, 1)
    assert attended_moments(weights, [0, 1, 2, 3]) == [(1.0, 0.5), (3.0, pytest.approx(0.35))]
    assert (
        attended_moments(np.zeros((2, 1, 1)), [0, 1]) == []
        and attended_moments(np.full((2, 1, 1), np.nan), [0, 1]) == []
    )
    assert len(attended_moments(np.eye(20).sum(0).cumsum().reshape(20, 1, 1), list(range(20)))) == 5
