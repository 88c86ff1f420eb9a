"""Deciding, from what enters a layer, how it is rounded: SmoothQuant and AWQ factors, activation ranges, W8A8 or weights only.

Every choice is made by the error at the layer's own output, ||quantised(x) @ quantised(W) - x @ W||², on a sample of rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ppllava_edge.calibration.statistics import InputStatistics, ranges
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.export.quantisation.quantize import Layer, Scheme, weight_only
from ppllava_edge.export.quantisation.rounding import round_int4, round_int8, unpack_int4

SMOOTH = (0.3, 0.5, 0.7)  # SmoothQuant's alpha
AWARE = (0.25, 0.5, 0.75)  # AWQ's exponent
COLUMNS = 512
MIN_DECODER_SQNR = 20.0  # decibels: a decoder layer below it keeps its activations in float (W8A16)


@dataclass
class Choice:
    """What was decided for one layer, and what the report tells: method (of the range), alpha, decibels at the output by kind."""

    weight: str
    stage: str
    scheme: Scheme
    shape: tuple[int, int]
    sqnr: dict[str, float] = field(default_factory=dict)
    method: str = ""
    alpha: float | None = None
    inputs: list[int] = field(
        default_factory=list
    )  # histogram of |x| after folding, 64 bins from 0 to largest_input
    weights: list[int] = field(
        default_factory=list
    )  # histogram of |W| after folding, 64 bins from 0 to largest_weight
    largest_input: float = 0.0
    largest_weight: float = 0.0


def choose_group(
    g: Graph, layers: Sequence[Layer], stats: InputStatistics, precision: str, block: int
) -> tuple[np.ndarray | None, list[Choice]]:
    """Layers that share an input → factors to fold (None: none) and a choice for each. precision: int8, int4 or weights (INT8 weights only)."""
    samples = [_Sample(g, layer, stats) for layer in layers]
    if stats.constant:
        why = "its input was all zeros on the calibration clips"
        return None, [
            Choice(s.layer.weight, g.name, Scheme("w8", why=why), s.shape, method="none") for s in samples
        ]
    foldable = all(layer.foldable for layer in layers) and precision != "weights"
    tried = []
    for alpha in (None, *((AWARE if precision == "int4" else SMOOTH) if foldable else ())):
        fold = None if alpha is None else factors(stats, samples, alpha, aware=precision == "int4")
        tried.append((alpha, fold, *_errors(samples, stats, fold, precision, block)))
    alpha, fold, errors, method = min(tried, key=lambda t: sum(t[2]))
    choices = []
    for sample, error in zip(samples, errors):
        kinds = {_kind(precision, sample.layer, block): decibels(sample.signal, error)}
        scheme = weight_only(
            sample.layer, "int4" if precision == "int4" else "int8", block, _importance(stats, fold)
        )
        if precision == "int8":
            kinds["w8"] = decibels(sample.signal, sample.weight_error(fold, "w8", block, None))
            scheme = Scheme("w8a8", activation_scale=max(method[1] / 127, 1e-12))
            if g.name == "decoder" and kinds["w8a8"] < MIN_DECODER_SQNR:
                scheme = Scheme("w8", why=f"W8A8 would leave {kinds['w8a8']:.1f} dB")
        x, w = (sample.x, sample.w) if fold is None else (sample.x / fold, sample.w * fold[:, None])
        choices.append(
            Choice(
                sample.layer.weight,
                g.name,
                scheme,
                sample.shape,
                kinds,
                method[0],
                alpha,
                np.histogram(np.abs(x), 64)[0].tolist(),
                np.histogram(np.abs(w), 64)[0].tolist(),
                float(np.abs(x).max()),
                float(np.abs(w).max()),
            )
        )
    return fold, choices


def factors(stats: InputStatistics, samples: Sequence[_Sample], alpha: float, aware: bool) -> np.ndarray:
    """s (K,), geometric mean 1. SmoothQuant: max|x|^a / max|W|^(1-a); AWQ: (mean x²)^(a/2)."""
    if aware:
        s = np.maximum(stats.mean_squares, 1e-12) ** (alpha / 2)
    else:
        assert stats.largest is not None
        weights = np.max([np.abs(sample.w).max(axis=1) for sample in samples], axis=0)
        s = np.maximum(stats.largest, 1e-5) ** alpha / np.maximum(weights, 1e-5) ** (1 - alpha)
    s = s / np.exp(np.log(s).mean())
    return np.clip(s, 1 / 64, 64).astype(np.float32)  # float16 norms must hold them


def decibels(signal: float, error: float) -> float:
    """Signal to noise; 99 when nothing was lost."""
    return float(min(10 * np.log10(signal / error), 99.0)) if error > 0 and signal > 0 else 99.0


class _Sample:
    """Sampled rows of a layer's input, sampled columns of its weight, and their product."""

    def __init__(self, g: Graph, layer: Layer, stats: InputStatistics):
        self.layer, self.shape = layer, (layer.inputs, layer.outputs)
        at = np.linspace(0, layer.outputs - 1, min(COLUMNS, layer.outputs)).round().astype(int)
        self.w = np.ascontiguousarray(
            g.weights[layer.weight].tensor.load()[:, at[: len(at) // 2 * 2]], np.float32
        )
        self.x = stats.rows
        self.y = self.x @ self.w
        self.signal = float(np.square(self.y, dtype=np.float64).sum())

    def rounded(
        self, fold: np.ndarray | None, kind: str, block: int, importance: np.ndarray | None
    ) -> np.ndarray:
        """The weight's columns after rounding."""
        if kind == "w4":
            found = round_int4(self.w, block, "float16", fold, importance)
            q = unpack_int4(found.values, self.w.shape).astype(np.float32)
            return (q.reshape(-1, block, q.shape[1]) * found.scales[:, None].astype(np.float32)).reshape(
                q.shape
            )
        found = round_int8(self.w, "float32", fold)
        return found.values * found.scales

    def weight_error(
        self, fold: np.ndarray | None, kind: str, block: int, importance: np.ndarray | None
    ) -> float:
        """Squared error at the output with float activations."""
        x = self.x if fold is None else self.x / fold
        return float(
            np.square(x @ self.rounded(fold, kind, block, importance) - self.y, dtype=np.float64).sum()
        )


def _errors(
    samples: Sequence[_Sample], stats: InputStatistics, fold: np.ndarray | None, precision: str, block: int
) -> tuple[list[float], tuple[str, float]]:
    """Squared error of every layer of a group, and the (method, limit) of its activation range."""
    importance = _importance(stats, fold)
    if precision != "int8":
        kinds = [weight_only(s.layer, "int4" if precision == "int4" else "int8", block) for s in samples]
        errors = [
            s.weight_error(fold, k.kind, k.block, importance if k.kind == "w4" else None)
            for s, k in zip(samples, kinds)
        ]
        return errors, ("weights", 0.0)
    x = samples[0].x if fold is None else samples[0].x / fold
    assert stats.largest is not None
    largest = float((stats.largest if fold is None else stats.largest / fold).max())
    weights = [s.rounded(fold, "w8", block, None) for s in samples]
    best: tuple[list[float], tuple[str, float]] | None = None
    for method, limit in ranges(np.abs(x).reshape(-1), largest).items():
        scale = np.float32(limit / 127)
        xq = np.rint(x / scale).clip(-127, 127) * scale
        errors = [float(np.square(xq @ w - s.y, dtype=np.float64).sum()) for s, w in zip(samples, weights)]
        if best is None or sum(errors) < sum(best[0]):
            best = errors, (method, limit)
    assert best is not None
    return best


def _importance(stats: InputStatistics, fold: np.ndarray | None) -> np.ndarray:
    return stats.mean_squares if fold is None else stats.mean_squares / np.square(fold, dtype=np.float64)


def _kind(precision: str, layer: Layer, block: int) -> str:
    return (
        "w8a8"
        if precision == "int8"
        else weight_only(layer, "int4" if precision == "int4" else "int8", block).kind
    )


def group_layers(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers by what they share."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return groups
