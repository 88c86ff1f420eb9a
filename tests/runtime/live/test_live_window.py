"""The window of encoded frames, and the slot in front of the encoder."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ppllava_edge.runtime.live.latest_slot import LatestSlot
from ppllava_edge.runtime.live.window import LiveFrame, Window, evenly_spaced


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.lists(st.floats(0.01, 5), min_size=1, max_size=300))
def test_the_window_keeps_its_size_the_newest_and_thins_with_age(capacity: int, steps: list[float]) -> None:
    window, t = Window(capacity), 0.0
    for i, step in enumerate(steps):
        t += step
        window.add(LiveFrame(i, t, None, np.zeros(1)))
    kept = window.frames()
    assert len(kept) == min(capacity, len(steps)) and kept[-1].number == len(steps) - 1
    numbers = [f.number for f in kept]
    assert numbers == sorted(set(numbers))
    half = capacity - (capacity + 1) // 2
    assert numbers[-half:] == list(range(len(steps)))[-half:] if half and len(steps) >= half else True


def test_a_window_of_hours_still_reaches_back() -> None:
    window = Window(64)
    for i in range(100_000):
        window.add(LiveFrame(i, i / 2, None, np.zeros(1)))
    ages = [(99_999 - f.number) / 2 for f in window.frames()]
    assert len(ages) == 64 and ages[0] > 40_000 and sum(age < 20 for age in ages) >= 30
    assert sum(60 < age < 3600 for age in ages) >= 5 and sum(age > 3600 for age in ages) >= 3
    forgetful = Window(64, history=100)
    for i in range(1000):
        forgetful.add(LiveFrame(i, i / 2, None, np.zeros(1)))
    assert forgetful.frames()[0].seconds >= 399.5


@given(st.integers(1, 200), st.integers(1, 64))
def test_evenly_spaced_positions_end_with_the_newest(count: int, limit: int) -> None:
    chosen = evenly_spaced(count, limit)
    assert len(chosen) == limit and chosen == sorted(chosen) and chosen[-1] == count - 1 and chosen[0] >= 0
    if count >= limit:
        assert len(set(chosen)) == limit


def test_the_slot_gives_the_newest_item_and_counts_the_dropped_ones() -> None:
    slot: LatestSlot[int] = LatestSlot()
    for i in range(5):
        slot.put(i)
    assert slot.take() == 4 and slot.dropped == 4
    taken: list[int | None] = []
    thread = threading.Thread(target=lambda: taken.append(slot.take()))
    thread.start()
    slot.close()
    thread.join(5)
    assert taken == [None]
