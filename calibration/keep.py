"""Keep the most sensitive layers in higher precision, so that the parity gate holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ppllava_edge.calibration.layer_choice import Choice
from ppllava_edge.export.quantisation.plan import Plan, Scheme

MAX_TRIES = 6  # runs of the gate, for models that fit in memory
LOW_SQNR = 15.0  # decibels at a layer's output, below which the layer is a candidate


@dataclass
class KeptLayers:
    """Raises layers in precision, within a budget.

    Attributes:
        plans: Stage → how its layers are quantised; changed in place.
        budget: How many layers may be raised.
        reasons: Weight name → why it was raised.
    """

    plans: Mapping[str, Plan]
    budget: int
    reasons: dict[str, str] = field(default_factory=dict)

    def raise_until(self, holds: Callable[[int], bool], sensitivity: Mapping[str, float]) -> None:
        """Raise the most sensitive layers, some at a time, until the gate holds or the budget is spent.

        Args:
            holds: Quantises by the plans and returns whether the gate holds; called with the number of the
                attempt.
            sensitivity: Weight name → divergence (nats) when only its group is quantised.
        """
        ranked = sorted(sensitivity, key=lambda weight: -sensitivity[weight])
        share = max(1, self.budget // (MAX_TRIES - 1))
        left = self.budget
        for attempt in range(MAX_TRIES):
            if holds(attempt) or left <= 0:
                return
            for weight in ranked[: min(share, left)]:
                self._raise(weight, f"its group alone costs {sensitivity[weight]:.2g} nats")
                left -= 1
            ranked = ranked[share:]

    def raise_worst(self, choices: Sequence[Choice]) -> None:
        """Raise the layers with the lowest signal-to-noise ratio at their output, below LOW_SQNR."""
        ratios = {choice.weight: min(choice.sqnr.values(), default=99.0) for choice in choices}
        low = sorted((weight for weight, sqnr in ratios.items() if sqnr < LOW_SQNR), key=lambda w: ratios[w])
        for weight in low[: self.budget]:
            self._raise(weight, f"{ratios[weight]:.1f} dB at its own output")

    def _raise(self, weight: str, why: str) -> None:
        """One step up: w8a8 and w4 of the decoder become w8; everything else becomes float."""
        for stage, plan in self.plans.items():
            scheme = plan.schemes.get(weight)
            if scheme is not None:
                kind = "w8" if stage == "decoder" and scheme.kind in ("w8a8", "w4") else "float"
                plan.schemes[weight] = Scheme(kind, why=why)
                self.reasons[weight] = why
