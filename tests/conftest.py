"""Shared fixtures: the golden data, small bundles, one real video. Each is built once for all workers."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from helpers.commands import GOLDEN, SAMPLE, run_command

# In CI two runs must give the same result; elsewhere every run tries new examples.
settings.register_profile("repeatable", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("repeatable")


def pytest_configure() -> None:
    """Pin each worker to its own cores: threads that spin on a shared core slow every worker down."""
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if worker and count > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % count :: count] or cores)


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder that is filled by the first worker that needs it, and reused by all others."""
    shared = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder, done = shared / name, shared / f"{name}.done"
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            build(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with tokenizers, in upstream's layout."""
    from ppllava_edge.bench.models.random_checkpoint import TINY, write_random_checkpoint

    built = built_once(
        tmp_path_factory, "tiny-checkpoint", lambda f: write_random_checkpoint(f / "checkpoint", TINY)
    )
    return built / "checkpoint"


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """That checkpoint, exported in fp32."""

    def export(folder: Path) -> None:
        run = run_command("ppllava-export", tiny_checkpoint, "-o", folder / "bundle", "--precision", "fp32")
        assert run.returncode == 0, run.stderr

    return built_once(tmp_path_factory, "tiny-bundle", export) / "bundle"


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vicuna_tiny_bt, exported in fp32 without tokenizers."""

    def export(folder: Path) -> None:
        source, precision = GOLDEN / "vicuna_tiny_bt", ("--precision", "fp32", "--no-tokenizer")
        run = run_command("ppllava-export", source, "-o", folder / "bundle", *precision)
        assert run.returncode == 0, run.stderr

    return built_once(tmp_path_factory, "golden-bundle", export) / "bundle"


@pytest.fixture(scope="session")
def moving_frames() -> np.ndarray:
    """(24, 96, 128, 3) uint8: each frame has a different grey level, which identifies it."""
    frames = np.zeros((24, 96, 128, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:] = 20 + 9 * i
        frame[20:50, 4 * i : 4 * i + 24] = (200, 40, 40)
    return frames


@pytest.fixture(scope="session")
def video_file(tmp_path_factory: pytest.TempPathFactory, moving_frames: np.ndarray) -> Path:
    """Those frames as H.264 in MP4, 12 frames a second."""
    from ppllava_edge.runtime.media.writing import write_video

    folder = built_once(
        tmp_path_factory,
        "moving-video",
        lambda f: write_video(f / "moving.mp4", moving_frames, fps=12, options={"crf": "10"}) and None,
    )
    return folder / "moving.mp4"


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where exported golden checkpoints are kept, for all workers of a test run."""
    return built_once(tmp_path_factory, "exports", lambda folder: None)


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A copy of the packed bundle, to build engines into."""
    from ppllava_edge.engines.bundle.packed import packed_bundle

    return Path(shutil.copytree(packed_bundle(), tmp_path / "nano"))


@pytest.fixture
def opened(nano: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Builds that nano copy's engine for a GPU target, opens it on doubles: (pipeline, driver, library)."""
    from helpers.gpu_engine import open_double

    return lambda target, **options: open_double(nano, target, monkeypatch, **options)


@pytest.fixture(scope="session")
def want() -> list[str]:
    """Nano's answers on the CPU to helpers.gpu_engine.QUESTIONS about the sample."""
    from helpers.gpu_engine import QUESTIONS
    from ppllava_edge import VideoQA

    video = VideoQA(device="cpu").open(SAMPLE)
    return [video.ask(question).text for question in QUESTIONS]


@pytest.fixture(scope="session")
def child_processes() -> Callable[[], set[int]]:
    """Finds the ids of this process's children, zombies included."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("looks at processes in /proc")

    def find() -> set[int]:
        found = set()
        for folder in Path("/proc").iterdir():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # not a process, or one that ended
                continue
            if int(fields[1]) == os.getpid():
                found.add(int(folder.name))
        return found

    return find
