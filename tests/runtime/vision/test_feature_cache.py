"""The feature cache on disk: keys, damaged entries, eviction, several processes, full disks."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.commands import SAMPLE
from ppllava_edge import FeatureCache, MediaError, VideoQA
from ppllava_edge.runtime.vision.feature_cache import CachedVideo, content_hash

QUESTION, ANSWER = "What color is the circle?", "red"


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
def test_a_damaged_entry_is_ignored(tmp_path: Path, damage: str) -> None:
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


def test_a_full_or_read_only_disk_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
