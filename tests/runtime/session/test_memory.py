"""Warming up, what a model holds in memory, arguments that can't work, engines that fail."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from helpers.commands import SAMPLE
from ppllava_edge import EngineError, VideoQA
from ppllava_edge.runtime.decoding.kv_cache import InPlaceSequence, KVCache
from ppllava_edge.runtime.encoding import candidates

COLOUR = "What color is the circle?"


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether a condition came true."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_a_warmed_up_model_loads_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppllava_edge.runtime.pipeline import cpu

    opened: list[Any] = []

    class Counting(cpu.Stage):
        def __init__(self, path: Any, *arguments: Any, **options: Any):
            opened.append((path.name, qa.engine_lock.held))
            super().__init__(path, *arguments, **options)

    monkeypatch.setattr(cpu, "Stage", Counting)
    qa = VideoQA(device="cpu")
    qa.warm_up()
    stages, caches = list(opened), qa.memory().caches
    assert len(stages) >= 5 and not any(held for _, held in stages)
    assert qa.open(SAMPLE).ask(COLOUR).text == "red"
    assert opened == stages and qa.memory().caches == caches  # the first answer's cache was there already
    assert qa.admission.held == qa.engine_lock.held == 0


def test_stages_never_open_while_the_engine_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppllava_edge.runtime.pipeline import cpu

    locked: list[str] = []

    class Watching(cpu.Stage):
        def __init__(self, path: Any, *arguments: Any, **options: Any):
            if qa.engine_lock.held:
                locked.append(path.name)
            super().__init__(path, *arguments, **options)

    monkeypatch.setattr(cpu, "Stage", Watching)
    for use in ("ask", "guided", "live", "image", "attention"):
        qa = VideoQA(device="cpu")
        if use == "live":
            live = qa.live(None)
            live.push(np.zeros((64, 64, 3), np.uint8))
            live.ask(COLOUR, wait=60)
        elif use == "attention":
            qa.open(SAMPLE).attention(COLOUR)
        else:
            chosen = {"select": "guided", "candidates": 16} if use == "guided" else {}
            qa.open(SAMPLE, **chosen).ask(COLOUR)  # type: ignore[arg-type]
        qa.close()
    assert locked == []


def test_a_question_that_loads_does_not_delay_a_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder is being opened for the first question; frames are encoded meanwhile."""
    from ppllava_edge.runtime.pipeline import cpu

    opening, go_on = threading.Event(), threading.Event()

    class Slow(cpu.Stage):
        def __init__(self, path: Any, *arguments: Any, **options: Any):
            if path.name.startswith("decoder"):
                opening.set()
                assert go_on.wait(60)
            super().__init__(path, *arguments, **options)

    monkeypatch.setattr(cpu, "Stage", Slow)
    with VideoQA(device="cpu") as qa:
        live = qa.live(None, fps=1000)
        live.push(np.zeros((64, 64, 3), np.uint8), t=0.0)
        assert live.wait_for(1, 60)
        asking = threading.Thread(target=lambda: live.ask(COLOUR))
        asking.start()
        assert opening.wait(60)
        for i in range(3):
            live.push(np.zeros((64, 64, 3), np.uint8), t=1.0 + i)
            assert live.wait_for(2 + i, 60)
        go_on.set()
        asking.join(60)


def test_memory_counts_weights_caches_and_features() -> None:
    qa = VideoQA(device="cpu")
    assert qa.memory().as_dict() == {"weights": 0, "caches": 0, "features": 0, "mapped": 0}
    video = qa.open(SAMPLE)
    pictures = sum(picture.nbytes for picture in video.encoded_video.pictures.values())
    assert qa.memory().features == video.features.nbytes + pictures
    trunk = qa.memory().weights
    video.ask(COLOUR)
    asked = qa.memory()
    assert 0 < trunk < asked.weights <= sum(f.stat().st_size for f in qa.pipeline.bundle.path.rglob("*.*"))
    info, cache = qa.pipeline.manifest.decoder, asked.caches
    position = 2 * info.layers * info.kv_heads * info.head_size * np.dtype(info.kv_dtype).itemsize
    assert cache > 0 and cache % position == 0
    for _ in range(3):
        video.ask(COLOUR)
    assert qa.memory().caches == cache  # one free cache is kept, and used again
    chat = qa.open(SAMPLE, keep="tokens")
    chat.ask(COLOUR)
    video.ask(COLOUR)  # the chat keeps a cache for itself
    assert qa.memory().caches > cache and qa.memory().features > asked.features
    del video, chat
    assert qa.memory().features == 0 and qa.memory().caches == cache


def test_memory_of_a_live_view_is_bounded_by_its_window() -> None:
    with VideoQA(device="cpu") as qa:
        live = qa.live(None, fps=1000, window=6)
        sizes = []
        for i in range(20):
            live.push(np.zeros((64, 64, 3), np.uint8), t=float(i))
            assert live.wait_for(i + 1, 60)
            sizes.append(qa.memory().features)
        assert sizes[0] < sizes[5] == sizes[6] == sizes[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"threads": 0},
        {"threads": 1.5},
        {"threads": "2"},
        {"threads": 100_000},
        {"parallel": 0},
        {"parallel": 2.0},
        {"parallel": True},
        {"parallel": None},
        {"queue": -1},
        {"queue": "many"},
        {"metrics": 1},
        {"bundle": 5},
        {"cache": 5},
        {"limits": 5},
        {"device": "tpu"},
        {"device": None},
        {"engine": 3},
    ],
)
def test_arguments_that_cannot_work_are_one_line(arguments: dict[str, Any]) -> None:
    with pytest.raises(EngineError) as caught:
        VideoQA(**({"device": "cpu"} | arguments))
    assert next(iter(arguments)) in str(caught.value) and "\n" not in str(caught.value)


def test_an_engine_that_failed_does_not_leave_its_cache_to_the_next_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qa = VideoQA(device="cpu")
    video = qa.open(SAMPLE)
    assert video.ask(COLOUR).text == "red"
    (free,) = qa.pipeline.decoder._idle
    passes = itertools.count()

    def fails(self: Any, tokens: list[int]) -> None:
        for buffer in self.cache.buffers.values():
            buffer.update_inplace(np.full(buffer.shape(), np.nan, np.float32))
        raise EngineError(f"pass {next(passes)} failed")

    with monkeypatch.context() as patch:
        patch.setattr(InPlaceSequence, "verify", fails)
        with pytest.raises(EngineError, match="pass 0"):
            video.ask(COLOUR)
    assert video.ask(COLOUR).text == "red" and qa.pipeline.decoder._idle != [free]


def test_too_little_memory_for_a_cache_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any) -> Any:
        raise MemoryError

    info = VideoQA(device="cpu").pipeline.manifest.decoder
    monkeypatch.setattr(np, "zeros", no_memory)
    with pytest.raises(EngineError, match="too little memory for a KV cache of 512 positions"):
        KVCache(info, 512)


def test_mapped_candidates_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "IN_MEMORY", 0)
    qa = VideoQA(device="cpu")
    video = qa.open(SAMPLE, select="guided", frames=4, candidates=16)
    held = video.encoded_video.candidates
    assert held is not None
    memory = qa.memory()
    assert memory.mapped == held.states.nbytes + held.features.nbytes
    assert memory.features == sum(picture.nbytes for picture in video.encoded_video.pictures.values())
