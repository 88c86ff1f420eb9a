"""Decide how a layer is rounded: SmoothQuant or AWQ scales, the activation range, W8A8 or weights only.

Every choice minimises the error at the layer's own output, ||quantised(x) @ quantised(W) - x @ W||², on a
sample of rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ppllava_edge.calibration.statistics import InputStatistics, ranges
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.export.quantisation.plan import Layer, Scheme, weight_only
from ppllava_edge.export.quantisation.rounding import round_int4, round_int8, unpack_int4

SMOOTHQUANT_ALPHAS = (0.3, 0.5, 0.7)
AWQ_EXPONENTS = (0.25, 0.5, 0.75)
COLUMNS = 512  # sampled columns of a weight
MIN_DECODER_SQNR = 20.0  # decibels: a decoder layer below it keeps its activations in float (W8A16)


@dataclass
class Choice:
    """The decision for one layer. An interrupted run stores the fields by name.

    Attributes:
        weight: Name of the layer's weight.
        stage: The stage of the layer.
        scheme: How the layer is stored.
        shape: (inputs, outputs).
        sqnr: Kind of storage → signal-to-quantisation-noise ratio at the layer's output, decibels.
        method: How the activation range was chosen.
        alpha: The exponent of the folded scales; None: nothing is folded.
        inputs: Histogram of |x| after folding, 64 bins from 0 to largest_input.
        weights: Histogram of |W| after folding, 64 bins from 0 to largest_weight.
        largest_input: The largest |x| of the sample after folding.
        largest_weight: The largest |W| of the sample after folding.
    """

    weight: str
    stage: str
    scheme: Scheme
    shape: tuple[int, int]
    sqnr: dict[str, float] = field(default_factory=dict)
    method: str = ""
    alpha: float | None = None
    inputs: list[int] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    largest_input: float = 0.0
    largest_weight: float = 0.0


class _Candidate(NamedTuple):
    """Scales to fold (None: none) and an activation range, with the squared error of every layer."""

    alpha: float | None
    fold: np.ndarray | None
    errors: list[float]
    method: str
    limit: float


class _Sample:
    """Sampled rows x of a layer's input, sampled columns w of its weight, and their product y."""

    def __init__(self, g: Graph, layer: Layer, stats: InputStatistics):
        self.layer = layer
        self.shape = (layer.inputs, layer.outputs)
        at = np.linspace(0, layer.outputs - 1, min(COLUMNS, layer.outputs)).round().astype(int)
        even = at[: len(at) // 2 * 2]  # INT4 packs two columns into a byte
        self.w = np.ascontiguousarray(g.weights[layer.weight].tensor.load()[:, even], np.float32)
        self.x = stats.rows
        self.y = self.x @ self.w
        self.signal = float(np.square(self.y, dtype=np.float64).sum())

    def rounded(
        self, fold: np.ndarray | None, kind: str, block: int, importance: np.ndarray | None
    ) -> np.ndarray:
        """The weight's columns after rounding."""
        if kind != "w4":
            int8 = round_int8(self.w, "float32", fold)
            return int8.values * int8.scales
        int4 = round_int4(self.w, block, "float16", fold, importance)
        q = unpack_int4(int4.values, self.w.shape).astype(np.float32)
        blocks = q.reshape(-1, block, q.shape[1]) * int4.scales[:, None].astype(np.float32)
        return blocks.reshape(q.shape)

    def weight_error(
        self, fold: np.ndarray | None, kind: str, block: int, importance: np.ndarray | None
    ) -> float:
        """Squared error at the output with float activations."""
        x = self.x if fold is None else self.x / fold
        difference = x @ self.rounded(fold, kind, block, importance) - self.y
        return float(np.square(difference, dtype=np.float64).sum())


def choose_group(
    g: Graph, layers: Sequence[Layer], stats: InputStatistics, precision: str, block: int
) -> tuple[np.ndarray | None, list[Choice]]:
    """Choose the rounding of layers that share an input.

    Args:
        g: The stage.
        layers: The group.
        stats: Statistics of its input.
        precision: "int8", "int4" or "weights" (INT8 weights only).
        block: Rows per INT4 scale.

    Returns:
        Scales (K,) to fold into the input's producer (None: none), and a choice for each layer.
    """
    samples = [_Sample(g, layer, stats) for layer in layers]
    if stats.constant:
        scheme = Scheme("w8", why="its input was always zero on the calibration clips")
        return None, [Choice(s.layer.weight, g.name, scheme, s.shape, method="none") for s in samples]
    alphas: list[float | None] = [None]
    if precision != "weights" and all(layer.foldable for layer in layers):
        alphas += AWQ_EXPONENTS if precision == "int4" else SMOOTHQUANT_ALPHAS
    candidates = [_candidate(alpha, samples, stats, precision, block) for alpha in alphas]
    best = min(candidates, key=lambda candidate: sum(candidate.errors))
    choices = [
        _choice(g.name, sample, error, best, stats, precision, block)
        for sample, error in zip(samples, best.errors)
    ]
    return best.fold, choices


def _choice(
    stage: str,
    sample: _Sample,
    error: float,
    best: _Candidate,
    stats: InputStatistics,
    precision: str,
    block: int,
) -> Choice:
    """The choice for one layer, given its group's best candidate."""
    fold = best.fold
    sqnr = {_kind(precision, sample.layer, block): decibels(sample.signal, error)}
    if precision == "int8":
        sqnr["w8"] = decibels(sample.signal, sample.weight_error(fold, "w8", block, None))
        scheme = Scheme("w8a8", activation_scale=max(best.limit / 127, 1e-12))
        if stage == "decoder" and sqnr["w8a8"] < MIN_DECODER_SQNR:
            scheme = Scheme("w8", why=f"W8A8 would leave only {sqnr['w8a8']:.1f} dB")
    else:
        scheme = _weight_only(sample.layer, precision, block, _importance(stats, fold))
    x = sample.x if fold is None else sample.x / fold
    w = sample.w if fold is None else sample.w * fold[:, None]
    return Choice(
        weight=sample.layer.weight,
        stage=stage,
        scheme=scheme,
        shape=sample.shape,
        sqnr=sqnr,
        method=best.method,
        alpha=best.alpha,
        inputs=np.histogram(np.abs(x), 64)[0].tolist(),
        weights=np.histogram(np.abs(w), 64)[0].tolist(),
        largest_input=float(np.abs(x).max()),
        largest_weight=float(np.abs(w).max()),
    )


def _candidate(
    alpha: float | None, samples: Sequence[_Sample], stats: InputStatistics, precision: str, block: int
) -> _Candidate:
    """Fold scales with this exponent and measure every layer's error."""
    fold = None if alpha is None else factors(stats, samples, alpha, aware=precision == "int4")
    if precision == "int8":
        errors, method, limit = _best_range(samples, stats, fold, block)
        return _Candidate(alpha, fold, errors, method, limit)
    importance = _importance(stats, fold)
    errors = []
    for sample in samples:
        scheme = _weight_only(sample.layer, precision, block)
        weighting = importance if scheme.kind == "w4" else None
        errors.append(sample.weight_error(fold, scheme.kind, scheme.block, weighting))
    return _Candidate(alpha, fold, errors, "weights", 0.0)


def _best_range(
    samples: Sequence[_Sample], stats: InputStatistics, fold: np.ndarray | None, block: int
) -> tuple[list[float], str, float]:
    """The activation range with the least error over the group: errors by layer, method and limit."""
    assert stats.largest is not None
    x = samples[0].x if fold is None else samples[0].x / fold
    largest = float((stats.largest if fold is None else stats.largest / fold).max())
    weights = [s.rounded(fold, "w8", block, None) for s in samples]
    best: tuple[list[float], str, float] | None = None
    for method, limit in ranges(np.abs(x).reshape(-1), largest).items():
        scale = np.float32(limit / 127)
        rounded = np.rint(x / scale).clip(-127, 127) * scale
        errors = [
            float(np.square(rounded @ w - s.y, dtype=np.float64).sum()) for s, w in zip(samples, weights)
        ]
        if best is None or sum(errors) < sum(best[0]):
            best = errors, method, limit
    assert best is not None
    return best


def factors(stats: InputStatistics, samples: Sequence[_Sample], alpha: float, aware: bool) -> np.ndarray:
    """Per-channel scales to fold.

    Args:
        stats: Statistics of the input.
        samples: Samples of the layers that share the input.
        alpha: Exponent of the scales.
        aware: AWQ: (mean x²)^(alpha/2). Otherwise SmoothQuant: max|x|^alpha / max|W|^(1-alpha).

    Returns:
        (K,) float32 with geometric mean 1.
    """
    if aware:
        s = np.maximum(stats.mean_squares, 1e-12) ** (alpha / 2)
    else:
        assert stats.largest is not None
        weights = np.max([np.abs(sample.w).max(axis=1) for sample in samples], axis=0)
        s = np.maximum(stats.largest, 1e-5) ** alpha / np.maximum(weights, 1e-5) ** (1 - alpha)
    s = s / np.exp(np.log(s).mean())
    return np.clip(s, 1 / 64, 64).astype(np.float32)  # float16 norms must hold them


def decibels(signal: float, error: float) -> float:
    """The signal-to-noise ratio of squared sums; 99 if there is no error."""
    return float(min(10 * np.log10(signal / error), 99.0)) if error > 0 and signal > 0 else 99.0


def _importance(stats: InputStatistics, fold: np.ndarray | None) -> np.ndarray:
    """Mean squares (K,) of the input after folding."""
    return stats.mean_squares if fold is None else stats.mean_squares / np.square(fold, dtype=np.float64)


def _weight_only(layer: Layer, precision: str, block: int, importance: np.ndarray | None = None) -> Scheme:
    return weight_only(layer, "int4" if precision == "int4" else "int8", block, importance)


def _kind(precision: str, layer: Layer, block: int) -> str:
    return "w8a8" if precision == "int8" else _weight_only(layer, precision, block).kind
