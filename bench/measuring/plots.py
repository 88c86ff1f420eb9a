"""Plots with matplotlib, which is optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppllava_edge.engines.errors import PPLLaVAError


def import_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only. Raises PPLLaVAError if matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise PPLLaVAError("--plot needs matplotlib: pip install 'ppllava-edge[plot]'") from None
    return plt


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure as PNG, all of it or nothing, and close it. Raises PPLLaVAError if that fails."""
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png", dpi=dpi)
        part.replace(path)
    except OSError as error:
        raise PPLLaVAError(f"can't write {path}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
        import_pyplot().close(figure)
