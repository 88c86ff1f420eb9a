"""Streamed statistics of the activations that enter a layer, which never need all of them in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.export.quantisation.plan import Layer

ROWS = 512  # rows kept of every layer's input, evenly spread over samples and positions
BINS = 2048


class InputStatistics:
    """The largest magnitude and the mean square of every input channel, both exact, and a sample of rows.

    The same data give the same sample.

    Args:
        name: Name of the layer, for errors.
        calls: How many arrays will be added, so that each contributes its share of rows.

    Attributes:
        largest: (K,), the largest magnitude per channel; None before the first array.
    """

    def __init__(self, name: str, calls: int):
        self.name = name
        self.rows_per_call = max(1, -(-ROWS // max(calls, 1)))
        self.largest: np.ndarray | None = None
        self._squares: np.ndarray | None = None
        self._count = 0
        self._rows: list[np.ndarray] = []

    def add(self, x: np.ndarray) -> None:
        """Add activations (…, K).

        Raises:
            PPLLaVAError: If x holds NaN or infinity.
        """
        flat = x.reshape(-1, x.shape[-1])
        largest = np.abs(flat).max(axis=0)
        if not np.isfinite(largest).all():
            raise PPLLaVAError(
                f"the activations that enter {self.name} are not finite: the checkpoint or a clip is damaged"
            )
        squares = np.einsum("ij,ij->j", flat, flat, dtype=np.float64)
        self.largest = largest if self.largest is None else np.maximum(self.largest, largest)
        self._squares = squares if self._squares is None else self._squares + squares
        self._count += len(flat)
        at = np.linspace(0, len(flat) - 1, min(self.rows_per_call, len(flat))).round().astype(int)
        self._rows.append(flat[at].astype(np.float32))

    @property
    def mean_squares(self) -> np.ndarray:
        """(K,) float64."""
        assert self._squares is not None
        return self._squares / self._count

    @property
    def rows(self) -> np.ndarray:
        """The sample of rows, (n, K) float32."""
        return np.concatenate(self._rows)

    @property
    def constant(self) -> bool:
        """Whether the input was always zero, so that it has no range."""
        return self.largest is None or not self.largest.any()


class StageStatistics:
    """Statistics of one stage's layers, by group of layers that share an input.

    Args:
        layers: The stage's layers.
        calls: How often the stage will run.

    Attributes:
        groups: Group → its layers.
    """

    def __init__(self, layers: Sequence[Layer], calls: int):
        self.groups = group_layers(layers)
        self._by_group = {
            group: InputStatistics(members[0].weight, calls * len(members[0].nodes))
            for group, members in self.groups.items()
        }
        self._group_of = {node.input[0]: layer.group for layer in layers for node in layer.nodes}

    def observe(self, sample: int, name: str, value: np.ndarray) -> None:
        """Add a value of a run if it is a layer's input; an observer for StageStream.run_segment."""
        if name in self._group_of:
            self._by_group[self._group_of[name]].add(value)

    def observed(self) -> dict[str, InputStatistics]:
        """Statistics of the groups that have received activations."""
        return {group: stats for group, stats in self._by_group.items() if stats.largest is not None}


def group_layers(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Group layers by the input that they share."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return groups


def ranges(magnitudes: np.ndarray, largest: float) -> dict[str, float]:
    """Candidate clipping ranges of a symmetric INT8 activation.

    Args:
        magnitudes: |x| of a sample, flat.
        largest: The exact maximum.

    Returns:
        Method → range. "max" keeps everything; percentiles cut the tail; "mse" has the least squared error;
        "entropy" the least divergence between the histogram and its quantised form (as TensorRT's calibrator
        chooses).
    """
    found = {"max": largest}
    if not len(magnitudes) or not magnitudes.any():
        return found
    for percent in (99.9, 99.99):
        found[f"percentile {percent:g}"] = float(np.percentile(magnitudes, percent))
    counts, edges = np.histogram(magnitudes, BINS, (0.0, float(magnitudes.max())))
    centres = (edges[1:] + edges[:-1]) / 2
    total = counts.sum()
    mse: list[float] = []
    entropy: list[float] = []
    cuts = np.unique(np.linspace(BINS // 16, BINS, 48).round().astype(int))
    for cut in cuts:
        step = edges[cut] / 127
        restored = np.rint(np.minimum(centres, edges[cut]) / step) * step
        mse.append(float((counts * np.square(restored - centres)).sum() / total))
        entropy.append(_divergence(counts, int(cut)))
    found["mse"] = float(edges[cuts[int(np.argmin(mse))]])
    found["entropy"] = float(edges[cuts[int(np.argmin(entropy))]])
    return {name: value for name, value in found.items() if value > 0}


def _divergence(counts: np.ndarray, cut: int, levels: int = 128) -> float:
    """KL(p || q): p the histogram with its tail in the last kept bin, q p rounded to `levels` levels."""
    p = counts[:cut].astype(np.float64)
    occupied = p > 0
    level = np.arange(cut) * levels // cut
    sums = np.bincount(level, p, levels)
    sizes = np.bincount(level, occupied, levels)
    q = np.where(occupied, (sums / np.maximum(sizes, 1))[level], 0.0)
    p[-1] += counts[cut:].sum()
    if not q.sum():
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    both = (p > 0) & (q > 0)
    missed = p[(p > 0) & (q == 0)].sum()
    return float((p[both] * np.log(p[both] / q[both])).sum() + missed * 10)
