"""Sensitivity of each layer: divergence of the next token with one group quantised and the rest in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ppllava_edge.calibration.gate.parity import divergence
from ppllava_edge.calibration.model.prompt import ClipQuestion
from ppllava_edge.calibration.model.streamed_model import StreamedModel
from ppllava_edge.calibration.statistics import group_layers
from ppllava_edge.export.quantisation.plan import Layer, Plan, find_layers
from ppllava_edge.export.quantisation.quantize import quantize

QUESTIONS = 6  # questions asked for every group
CHANGED_FEATURES = "sensitivity.features"


def sensitivity(
    model: StreamedModel,
    batches: Sequence[list[int]],
    questions: Sequence[ClipQuestion],
    plans: Mapping[str, Plan],
    scratch: Path,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, float]:
    """Measure the effect of quantising each group alone, for models that fit in memory.

    Args:
        model: The float model.
        batches: Samples of each clip in the vision tower.
        questions: Candidates, of which QUESTIONS, evenly spread, are asked.
        plans: Stage → how its layers would be quantised.
        scratch: A folder for temporary files.
        progress: Called with (groups done, groups in all).

    Returns:
        Weight name → mean KL divergence (nats) of the next token when only its group is quantised.
    """
    probe = _Probe(model, batches, _spread(questions))
    groups = list(_groups(model, plans))
    found: dict[str, float] = {}
    for done, (stage, group, members) in enumerate(groups):
        progress(done, len(groups))
        plan = plans[stage]
        schemes = {
            layer.weight: plan.schemes[layer.weight] for layer in members if layer.weight in plan.schemes
        }
        if all(scheme.kind == "float" for scheme in schemes.values()):
            continue
        g = model.graphs[stage].copy()
        quantize(g, Plan(schemes, {group: plan.folds[group]} if group in plan.folds else {}))
        with model.replaced(stage, g, scratch / "one"):
            found |= dict.fromkeys(schemes, probe.divergence(stage))
    probe.restore_trunk()
    return found


def _groups(model: StreamedModel, plans: Mapping[str, Plan]) -> Iterator[tuple[str, str, list[Layer]]]:
    """(stage, group, layers) of every stage with a plan."""
    for stage in plans:
        for group, members in group_layers(find_layers(model.graphs[stage])).items():
            yield stage, group, members


def _spread(questions: Sequence[ClipQuestion]) -> list[ClipQuestion]:
    at = np.linspace(0, len(questions) - 1, min(QUESTIONS, len(questions))).round().astype(int)
    return [questions[i] for i in dict.fromkeys(at.tolist())]


class _Probe:
    """Asks questions of the float model and of the model with one stage replaced."""

    def __init__(self, model: StreamedModel, batches: Sequence[list[int]], questions: Sequence[ClipQuestion]):
        self.model = model
        self.batches = batches
        self.questions = questions
        self.clips = sorted({asked.clip for asked in questions})
        self.answers = {asked.index: model.answer_ids(asked.answer) for asked in questions}
        self._float_trunk = True  # whether the stored states are the float trunk's
        self.expected = self._logits("trunk")

    def divergence(self, stage: str) -> float:
        """Mean divergence from the float model, nats. stage: the currently replaced stage."""
        if stage != "trunk":
            self.restore_trunk()
        got = self._logits(stage)
        self._float_trunk = stage != "trunk"
        each = [divergence(self.expected[asked.index], got[asked.index]) for asked in self.questions]
        return float(np.mean(np.concatenate(each)))

    def restore_trunk(self) -> None:
        """Store the float trunk's states again, if a replaced trunk has overwritten them."""
        if not self._float_trunk:
            self._run_trunk()
            self._float_trunk = True

    def _run_trunk(self) -> None:
        for clip in self.clips:
            self.model.streams["trunk"].run(self.batches[clip], self.model.values)

    def _logits(self, changed: str) -> dict[int, np.ndarray]:
        """Logits of the last prompt position and of every answer token, by question.

        Args:
            changed: The first stage to run; the outputs of earlier stages are in the store.
        """
        model = self.model
        if changed == "trunk":
            self._run_trunk()
        vision = changed in ("trunk", "temporal")
        if vision:
            for clip in self.clips:
                model.values.put(clip, CHANGED_FEATURES, model.features(self.batches[clip]))
        name = CHANGED_FEATURES if vision else "features"
        for asked in self.questions:
            answer = self.answers[asked.index]
            model.put_prompt(asked.index, model.embed(asked.clip, asked.question, answer, name).embeds)
        logits = model.logits([asked.index for asked in self.questions])
        return {index: logits[index][-(len(answer) + 1) :] for index, answer in self.answers.items()}
