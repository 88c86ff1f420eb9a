"""What is remembered of the activations that enter a layer: streamed, so that never all of them are in memory."""

from __future__ import annotations

import numpy as np

from ppllava_edge.engines.errors import PPLLaVAError

ROWS = 512  # kept of every layer's input, evenly spread over samples and positions
BINS = 2048


class InputStatistics:
    """Per input channel: largest magnitude and mean square, exactly; and a sample of rows. The same data give the same sample.

    calls: how many arrays will come, so that each leaves its share of rows.
    """

    def __init__(self, name: str, calls: int):
        self.name = name
        self.rows_per_call = max(1, -(-ROWS // max(calls, 1)))
        self.largest: np.ndarray | None = None
        self._squares: np.ndarray | None = None
        self._count = 0
        self._rows: list[np.ndarray] = []

    def add(self, x: np.ndarray) -> None:
        """x (…, K). Raises PPLLaVAError if it holds NaN or infinity."""
        flat = x.reshape(-1, x.shape[-1])
        largest = np.abs(flat).max(axis=0)
        if not np.isfinite(largest).all():
            raise PPLLaVAError(
                f"the activations that enter {self.name} are not finite; the checkpoint is damaged, or a clip is"
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
        """(n, K) float32, the sample."""
        return np.concatenate(self._rows)

    @property
    def constant(self) -> bool:
        """Whether nothing but zeros was seen: no range can be told from that."""
        return self.largest is None or not self.largest.any()


def ranges(magnitudes: np.ndarray, largest: float) -> dict[str, float]:
    """Candidate clipping ranges of a symmetric INT8 activation, by method.

    magnitudes: |x| of a sample, flat. largest: the exact maximum. max keeps everything; percentiles cut the tail; mse has the least
    squared error; entropy the least divergence between the histogram and its quantised form (as TensorRT's calibrator chose).
    """
    found = {"max": largest}
    if not len(magnitudes) or not magnitudes.any():
        return found
    for percent in (99.9, 99.99):
        found[f"percentile {percent:g}"] = float(np.percentile(magnitudes, percent))
    counts, edges = np.histogram(magnitudes, BINS, (0.0, float(magnitudes.max())))
    centres, total = (edges[1:] + edges[:-1]) / 2, counts.sum()
    mse, entropy = [], []
    cuts = np.unique(np.linspace(BINS // 16, BINS, 48).round().astype(int))
    for cut in cuts:
        step = edges[cut] / 127
        restored = np.rint(np.minimum(centres, edges[cut]) / step) * step
        mse.append(float((counts * np.square(restored - centres)).sum() / total))
        entropy.append(_divergence(counts, int(cut)))
    found["mse"], found["entropy"] = (
        float(edges[cuts[int(np.argmin(mse))]]),
        float(edges[cuts[int(np.argmin(entropy))]]),
    )
    return {name: value for name, value in found.items() if value > 0}


def _divergence(counts: np.ndarray, cut: int, levels: int = 128) -> float:
    """KL(p || q): p the histogram with its tail moved into the last kept bin, q the same after rounding to `levels` levels."""
    p = counts[:cut].astype(np.float64)
    occupied = p > 0
    level = np.arange(cut) * levels // cut
    sums, sizes = np.bincount(level, p, levels), np.bincount(level, occupied, levels)
    q = np.where(occupied, (sums / np.maximum(sizes, 1))[level], 0.0)
    p[-1] += counts[cut:].sum()
    if not q.sum():
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    both = (p > 0) & (q > 0)
    missed = p[(p > 0) & (q == 0)].sum()
    return float((p[both] * np.log(p[both] / q[both])).sum() + missed * 10)
