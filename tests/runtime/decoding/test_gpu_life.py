"""GPU memory over a long life, on a double of the driver that counts it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from helpers.commands import SAMPLE
from helpers.gpu_doubles import FakeDriver
from helpers.gpu_engine import QUESTIONS, Opened, asking
from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.backends.device_memory import BlockPool


class CountingDriver(FakeDriver):
    """Counts what is created and destroyed besides memory."""

    def __init__(self) -> None:
        super().__init__()
        self.destroyed: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.endswith(("Destroy", "FreeHost")):
            self.destroyed.append(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("target", ["orin", "orin-jp6", "cuda"])
def test_closing_frees_all_memory_of_the_gpu(
    opened: Callable[..., Opened], want: list[str], target: str
) -> None:
    pipeline, driver, _ = opened(target)
    with asking(pipeline) as qa:
        video, chat = qa.open(SAMPLE), qa.open(SAMPLE, keep="tokens")
        assert video.ask(QUESTIONS[1]).text == want[1] and chat.ask(QUESTIONS[0]).text == want[0]
        memory = qa.memory()
        assert memory.caches > 0 and memory.features > 0 and memory.weights > 0
    assert qa.memory().caches == 0
    del video, chat, qa, pipeline, memory
    gc.collect()
    assert driver.used == 0


def test_what_is_in_use_when_the_device_is_closed_is_freed_afterwards() -> None:
    driver = FakeDriver()
    device = CudaDevice(driver)
    used, unused = device.empty((1000,), "u1"), device.empty((10,), "u1")
    del unused
    device.close()
    assert driver.used == 1000
    assert device.download(used).shape == (1000,)  # a call under way may go on
    del used
    assert driver.used == 0


def test_a_dropped_device_frees_its_memory() -> None:
    driver = CountingDriver()
    device = CudaDevice(driver)
    import numpy as np

    device.upload(np.zeros(100, np.uint8))
    assert len(driver.alive) == 2  # the block and a pinned buffer
    del device
    gc.collect()
    assert not driver.alive and {"cuStreamDestroy", "cuEventDestroy"} <= set(driver.destroyed)


def test_captured_graphs_are_destroyed() -> None:
    driver = CountingDriver()
    device = CudaDevice(driver)
    for _ in range(3):
        device.capture(lambda: None)()
    device.close()
    assert driver.launches == 3
    assert driver.destroyed.count("cuGraphExecDestroy") == driver.destroyed.count("cuGraphDestroy") == 3


def test_unused_blocks_are_bounded() -> None:
    """Prompts of a thousand lengths leave blocks of a thousand sizes."""
    alive: dict[int, int] = {}

    def allocate(size: int) -> int:
        address = next(i for i in range(1, 10_000) if i not in alive)
        alive[address] = size
        return address

    pool = BlockPool(allocate, alive.pop, max_spare=1000)
    largest = 0
    for size in range(1, 1000):
        block = pool.take(size)
        del block
        largest = max(largest, sum(alive.values()))
    assert largest < 3000
    again = pool.take(999)
    assert sum(alive.values()) <= 3000
    del again
    pool.close()
    assert not alive
