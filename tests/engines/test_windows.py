"""Pooling windows: kernel, stride and output size resolve to each other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ppllava_edge.engines.bundle.windows import Windows
from ppllava_edge.engines.errors import PPLLaVAError


@given(st.integers(1, 64), st.integers(1, 30), st.data())
def test_resolved_windows_cover_the_grid(frames: int, side: int, data: st.DataObject) -> None:
    parts = [data.draw(st.none() | st.tuples(*[st.integers(1, 12)] * 3)) for _ in range(3)]
    size = (frames, side, side)
    try:
        output, kernel, stride = Windows(*parts).resolve(size)
    except PPLLaVAError:
        return
    for n, o, k, s in zip(size, output, kernel, stride):
        assert (o - 1) * s + k <= n and (n - k) // s + 1 == o
