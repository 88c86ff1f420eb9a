"""Any-resolution images: one view of the whole image plus a grid of crops, as LLaVA-NeXT does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def best_resolution(size: tuple[int, int], grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of the grids that keeps most of an image of size (height, width) and wastes least."""
    height, width = size
    best, best_effective, least_waste = grids[0], 0, float("inf")
    for grid_height, grid_width in grids:
        scale = min(grid_width / width, grid_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = grid_width * grid_height - effective
        if effective > best_effective or (effective == best_effective and waste < least_waste):
            best, best_effective, least_waste = (grid_height, grid_width), effective, waste
    return best


def unpad(tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """tokens (rows, columns, D) over an image that was padded to their aspect → without the padding. size: (height, width) of the image."""
    height, width = size
    rows, columns = tokens.shape[:2]
    if width / height > columns / rows:
        padding = (rows - int(height * (columns / width))) // 2
        return tokens[padding : rows - padding]
    padding = (columns - int(width * (rows / height))) // 2
    return tokens[:, padding : columns - padding]


def assemble(
    tiles: np.ndarray,
    grid: tuple[int, int],
    size: tuple[int, int],
    grids: Sequence[tuple[int, int]],
    tile: int,
    newline: np.ndarray,
) -> np.ndarray:
    """tiles (1+n, rows*columns, D) → (N,D): tile 0, then the crops laid out, unpadded, a newline vector after every row."""
    best_height, best_width = best_resolution(size, grids)
    down, across, (rows, columns), depth = best_height // tile, best_width // tile, grid, tiles.shape[-1]
    if down * across != len(tiles) - 1:
        raise ValueError(f"an image of {size} makes {down}x{across} crops, not {len(tiles) - 1}")
    crops = (
        tiles[1:]
        .reshape(down, across, rows, columns, depth)
        .transpose(0, 2, 1, 3, 4)
        .reshape(down * rows, across * columns, depth)
    )
    crops = unpad(crops, size)
    lines = np.concatenate([crops, np.broadcast_to(newline, (len(crops), 1, depth))], axis=1)
    return np.concatenate([tiles[0], lines.reshape(-1, depth)])
