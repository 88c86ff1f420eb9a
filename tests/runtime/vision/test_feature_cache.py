"""The feature cache on disk: keys, damaged entries, eviction, several processes, full disks."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.commands import SAMPLE
from ppllava_edge import FeatureCache, MediaError, PPLLaVAError, VideoQA
from ppllava_edge.runtime.vision import feature_cache
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
    before = content_hash(path)
    with open(path, "r+b") as file:  # in the middle, which isn't read
        file.seek(10 << 30)
        file.write(b"x")
    assert content_hash(path) != before
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.png").write_bytes(b"a")
    (tmp_path / "folder" / os.fsdecode(b"\xff.png")).write_bytes(b"a")
    (tmp_path / "folder" / "nowhere.png").symlink_to("nothing")
    before = content_hash(tmp_path / "folder")
    (tmp_path / "folder" / "2.png").write_bytes(b"a")
    assert content_hash(tmp_path / "folder") != before
    with pytest.raises(MediaError, match="no such file"):
        content_hash(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match="not a regular file"):
        content_hash(tmp_path / "pipe")


def test_a_copy_with_its_time_has_the_same_hash(tmp_path: Path) -> None:
    first = shutil.copy2(SAMPLE, tmp_path / "first.mp4")
    second = shutil.copy2(first, tmp_path / "second.mp4")
    assert content_hash(first) == content_hash(second)
    os.utime(second, ns=(0, 0))
    assert content_hash(first) != content_hash(second)


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


def header(**changes: Any) -> bytes:
    """A file's beginning: an array "features" of two bytes, with fields changed."""
    tensor = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], **changes}
    text = json.dumps({"__metadata__": {"facts": "{}", "checksums": "{}"}, "features": tensor}).encode()
    return len(text).to_bytes(8, "little") + text


HOSTILE = {
    "a header of exabytes": b"\xff" * 8,
    "a header as long as the file": (1 << 22).to_bytes(8, "little") + b"{" * (1 << 22),
    "a header of nested lists": (60_000).to_bytes(8, "little") + b"[" * 60_000,
    "a shape of exabytes": header(shape=[1 << 40, 1 << 40]) + b"ab",
    "a shape beyond every limit": header(shape=[1 << 80]) + b"ab",
    "a negative shape": header(shape=[-2]) + b"ab",
    "many dimensions": header(shape=[1] * 100) + b"ab",
    "offsets behind the end": header(data_offsets=[1 << 40, (1 << 40) + 2]) + b"ab",
    "offsets that go back": header(data_offsets=[2, 0]) + b"ab",
    "an unknown type": header(dtype="F8_E4M3") + b"ab",
    "a type that is no text": header(dtype=[]) + b"ab",
    "no metadata": (2).to_bytes(8, "little") + b"{}",
    "another checksum": header() + b"ab",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_entry_costs_no_memory(tmp_path: Path, name: str) -> None:
    cache = FeatureCache(tmp_path)
    cache.path("key").write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        assert cache.load("key") is None
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert not cache.path("key").exists()


def test_only_regular_files_of_a_possible_size_are_entries(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", limit=1 << 20)
    assert cache.store(entry(100), "real")
    elsewhere = tmp_path / "elsewhere"
    cache.path("real").rename(elsewhere)
    cache.path("link").symlink_to(elsewhere)
    cache.path("device").symlink_to("/dev/zero")
    os.mkfifo(cache.path("pipe"))
    with open(cache.path("huge"), "wb") as file:
        file.truncate(1 << 40)  # sparse
    for key in ("link", "device", "pipe", "huge"):
        assert cache.load(key) is None and not os.path.lexists(cache.path(key)), key
    assert elsewhere.exists()


def test_large_arrays_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path)
    cache.store(entry(5000), "key")
    monkeypatch.setattr(feature_cache, "IN_MEMORY", 4000)
    found = cache.load("key")
    assert found is not None and isinstance(found.arrays["features"], np.memmap)
    np.testing.assert_array_equal(found.arrays["features"], entry(5000).arrays["features"])


def test_nobody_else_may_write_to_the_folder(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    assert cache.store(entry(10), 1) and (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert cache.path(1).stat().st_mode & 0o077 == 0
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(PPLLaVAError, match="chmod o-w"):
        FeatureCache(tmp_path / "cache")


def test_a_file_is_no_cache_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PPLLaVAError, match="is a file; name a folder"):
        FeatureCache(tmp_path / "file")


@pytest.mark.parametrize("limit", [-1, "4GB", 1.5, None])
def test_the_limit_is_a_number_of_bytes(tmp_path: Path, limit: Any) -> None:
    with pytest.raises(PPLLaVAError, match="number of bytes"):
        FeatureCache(tmp_path, limit)


def test_what_a_killed_process_left_is_removed_at_once(tmp_path: Path) -> None:
    program = (
        "import os, sys; from ppllava_edge.engines.staging import staging_folder; from pathlib import Path\n"
        "with staging_folder(Path(sys.argv[1]) / 'x') as folder:\n"
        "    (folder / 'half').write_bytes(b'half'); os.kill(os.getpid(), 9)"
    )
    for use in ("load", "store"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path)])
        assert len(list(tmp_path.glob(".*.part"))) == 1
        cache = FeatureCache(tmp_path)
        assert cache.load(1) is None if use == "load" else cache.store(entry(10), 1)
        assert not list(tmp_path.glob(".*.part"))


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


def test_arrays_that_share_their_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file would need any amount of memory."""
    cache = FeatureCache(tmp_path)
    monkeypatch.setattr(feature_cache, "_array", lambda *arguments: pytest.fail("an array was read"))
    tensor = {"dtype": "U8", "shape": [1 << 20], "data_offsets": [0, 1 << 20]}
    arrays = {f"a{i}": tensor for i in range(5)}
    text = json.dumps({"__metadata__": {"facts": "{}", "checksums": "{}"}, **arrays}).encode()
    cache.path("key").write_bytes(len(text).to_bytes(8, "little") + text + bytes(1 << 20))
    assert cache.load("key") is None and not cache.path("key").exists()


def test_errors_of_a_hash_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"a\\nb"):
        content_hash(tmp_path / "a\nb")
