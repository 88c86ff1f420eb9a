"""Engines and inputs that the GPU pipeline refuses, each in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import SAMPLE
from helpers.gpu_doubles import FakeDriver
from helpers.gpu_engine import QUESTIONS, Opened, asking, open_double
from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.targets import select


def test_too_many_frames_for_the_profile(opened: Callable[..., Opened]) -> None:
    pipeline, *_ = opened("orin")
    with pytest.raises(EngineError, match=r"states is \(9, .*built for \(1, .* to \(8, "):
        pipeline._run(
            "temporal", {"states": np.zeros((9, 2, 82, 128), np.float16)}, {"features": (9, 81, 128)}
        )


def test_too_little_memory_says_how_much_is_missing(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, *_ = open_double(nano, "orin", monkeypatch, FakeDriver(memory=400_000))
    with pytest.raises(
        EngineError, match=r"out of memory: \d+ MB are needed in one piece, \d+ of 0 MB are free"
    ):
        asking(pipeline).open(SAMPLE).ask(QUESTIONS[0])


FAULTS = [
    ("deserialize", "another version or for another GPU; rebuild it"),
    ("context", "too little memory"),
    ("execute", "failed"),
]


@pytest.mark.parametrize("fault, words", FAULTS)
def test_engines_that_the_library_refuses(opened: Callable[..., Opened], fault: str, words: str) -> None:
    pipeline, _, trt = opened("orin")
    trt.fail = fault
    with pytest.raises(EngineError, match=words):
        asking(pipeline).open(SAMPLE)


def test_a_damaged_engine_never_reaches_the_library(opened: Callable[..., Opened], nano: Path) -> None:
    opened("orin")
    file = nano / "engines" / "orin" / "trunk.engine"
    file.write_bytes(file.read_bytes().replace(b"trunk", b"drunk"))
    monkey = pytest.MonkeyPatch()
    monkey.setattr(select, "ON_CPU", ())
    with pytest.raises(
        EngineError, match=r"trunk.engine is damaged; rebuild it: ppllava-build .* --target orin --force"
    ):
        select.select(Bundle.open(nano), "cuda", "tensorrt")
    monkey.undo()


def test_no_gpu_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="no NVIDIA GPU was found"):
        CudaDevice(FakeDriver(devices=0))
    broken = FakeDriver()
    monkeypatch.setattr(broken, "cuStreamCreate", lambda flags: (999, None))
    with pytest.raises(EngineError, match="cuStreamCreate failed: a made-up error"):
        CudaDevice(broken)
    with pytest.raises(EngineError, match=r"cuda-core: pip install|no NVIDIA driver"):
        CudaDevice()


def test_blocks_are_reused_and_freed_when_memory_is_short() -> None:
    device = CudaDevice(FakeDriver(memory=1000))
    first = device.empty((400,), np.uint8)
    address = first.address
    del first
    again = device.empty((100,), np.float32)
    assert again.address == address and device.driver.allocations == 1, "a block of the same size"
    del again
    assert device.driver.used == 400
    large = device.empty((800,), np.uint8)  # fits only when the spare block goes
    assert device.driver.used == 800 and large.nbytes == 800
    with pytest.raises(EngineError, match="out of memory"):
        device.empty((400,), np.uint8)
    part = large.rows(100, 50)
    del large
    assert device.driver.used == 800 and part.nbytes == 50, "a part keeps the whole alive"
    with pytest.raises(EngineError, match="out of memory"):
        device.empty((400,), np.uint8)
