"""Any-resolution images: a view of the whole image plus a grid of crops, as LLaVA-NeXT does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def best_resolution(size: tuple[int, int], grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Choose the grid that keeps most of an image's pixels, and among equals the one that wastes least.

    Args:
        size: Height and width of the image.
        grids: The choices, (height, width) in pixels.

    Returns:
        Height and width of the chosen grid.
    """
    height, width = size
    best = grids[0]
    most_kept = 0
    least_wasted = float("inf")
    for grid_height, grid_width in grids:
        scale = min(grid_width / width, grid_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = grid_width * grid_height - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best = grid_height, grid_width
            most_kept = kept
            least_wasted = wasted
    return best


def unpad(tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Remove the tokens of letterbox margins.

    Args:
        tokens: (rows, columns, D), of an image that was padded to their aspect.
        size: Height and width of the image before.

    Returns:
        (fewer rows, columns, D) or (rows, fewer columns, D).
    """
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
    """Put the tokens of an image's tiles in order.

    Args:
        tiles: (1+n, rows*columns, D): the whole image, then its n crops row by row.
        grid: Rows and columns of tokens in one tile.
        size: Height and width of the image, pixels.
        grids: The choices of crops, as `best_resolution` takes them.
        tile: Side of a tile, pixels.
        newline: (D,), a vector to put after every row of the crops.

    Returns:
        (N, D): the whole image, then the crops as one picture without margins.

    Raises:
        ValueError: If the number of tiles doesn't match the image.
    """
    best_height, best_width = best_resolution(size, grids)
    down, across = best_height // tile, best_width // tile
    rows, columns = grid
    depth = tiles.shape[-1]
    if down * across != len(tiles) - 1:
        raise ValueError(f"an image of {size} makes {down}x{across} crops, not {len(tiles) - 1}")
    crops = tiles[1:].reshape(down, across, rows, columns, depth)
    picture = crops.transpose(0, 2, 1, 3, 4).reshape(down * rows, across * columns, depth)
    picture = unpad(picture, size)
    newlines = np.broadcast_to(newline, (len(picture), 1, depth))
    lines = np.concatenate([picture, newlines], axis=1)
    return np.concatenate([tiles[0], lines.reshape(-1, depth)])
