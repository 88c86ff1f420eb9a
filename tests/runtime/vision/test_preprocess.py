"""Preprocessing gives upstream's pixels, for videos and for the tiles of single images."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.commands import GOLDEN
from ppllava_edge.engines.bundle.manifest import Preprocessing
from ppllava_edge.runtime.vision.anyres import best_resolution, unpad
from ppllava_edge.runtime.vision.preprocess import preprocess_image, preprocess_video

INFO = json.loads((GOLDEN / "preprocess" / "info.json").read_text())
PIXELS = np.load(GOLDEN / "preprocess" / "pixel_values.npz")
FRAMES = [np.load(GOLDEN / "preprocess" / "frames.npz")[f"frame_{i}"] for i in range(4)]
GRIDS = tuple((h, w) for h, w in INFO["grid_pinpoints"])
CLIP = Preprocessing("squash", 84, tuple(INFO["clip_mean"]), tuple(INFO["clip_std"]), GRIDS)
SIGLIP = Preprocessing("pad", 84, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), GRIDS)


def test_clip_video_pixels() -> None:
    expected = PIXELS["clip_video_pixel_values"][:, 0]
    np.testing.assert_allclose(preprocess_video(FRAMES, CLIP), expected, atol=1e-6)


def test_siglip_video_pixels() -> None:
    """The golden data hold every 12th pixel, one whole row, and the sums of all channels."""
    pixels = preprocess_video(FRAMES, replace(SIGLIP, size=384))
    sampled = PIXELS["siglip_video_pixel_values_stride12"][:, 0]
    np.testing.assert_allclose(pixels[..., ::12, ::12], sampled, atol=1e-6)
    np.testing.assert_allclose(pixels[:, :, 192], PIXELS["siglip_video_row192"][:, 0], atol=1e-6)
    sums = pixels.astype(np.float64).sum((2, 3))
    np.testing.assert_allclose(sums, PIXELS["siglip_video_channel_sum"][:, 0], atol=0.05)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("i", range(4))
def test_any_resolution_tiles(family: str, i: int) -> None:
    tiles = preprocess_image(FRAMES[i], CLIP if family == "clip" else SIGLIP)
    assert [1, *tiles.shape] == INFO[f"{family}_image_shape_{i}"]
    expected = PIXELS[f"{family}_image_pixel_values_{i}"][0]
    np.testing.assert_allclose(tiles[..., ::4, ::4], expected, atol=1e-6)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 40), st.integers(1, 40))
def test_unpadding_removes_rows_or_columns(height: int, width: int, rows: int, columns: int) -> None:
    tokens = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns, 1)
    left = unpad(tokens, (height, width))
    assert left.ndim == 3 and left.shape[0] <= rows and left.shape[1] <= columns
    assert left.shape[0] == rows or left.shape[1] == columns
    assert best_resolution((height, width), GRIDS) in GRIDS
