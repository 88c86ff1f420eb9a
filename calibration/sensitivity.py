"""Which layers hurt: one group of layers quantised at a time, the rest float, judged by what the model says in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ppllava_edge.calibration.choose import group_layers
from ppllava_edge.calibration.data import Clip
from ppllava_edge.calibration.parity import divergence
from ppllava_edge.calibration.reference import Asked, StreamedModel, _Small, all_logits
from ppllava_edge.calibration.stream import StageStream
from ppllava_edge.export.quantisation.quantize import Plan, find_layers, quantize

SAMPLES = 6  # questions that judge; every layer is tried on all of them


def sensitivity(
    model: StreamedModel,
    clips: Sequence[Clip],
    chunks: Sequence[list[int]],
    asked: Sequence[Asked],
    plans: dict[str, Plan],
    scratch: Path,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, float]:
    """Weight name → mean KL divergence (nats) of the next token when only its group is quantised. For models that fit in memory."""
    few = _spread(asked)
    answers = {a.index: model.answer_ids(a.answer) for a in few}
    want = _logits(model, chunks, few, answers, "trunk")
    groups = [
        (stage, group, members)
        for stage in plans
        for group, members in group_layers(find_layers(model.graphs[stage])).items()
    ]
    found: dict[str, float] = {}
    clean = True  # whether the store holds what the float trunk gives
    for done, (stage, group, members) in enumerate(groups):
        tell(done, len(groups))
        if stage != "trunk" and not clean:
            _run_trunk(model, chunks, few)
            clean = True
        plan = plans[stage]
        schemes = {
            layer.weight: plan.schemes[layer.weight] for layer in members if layer.weight in plan.schemes
        }
        if all(scheme.kind == "float" for scheme in schemes.values()):
            continue
        g = model.graphs[stage].copy()
        quantize(g, Plan(schemes, {group: plan.folds[group]} if group in plan.folds else {}))
        stream = StageStream(all_logits(g) if stage == "decoder" else g, scratch / "one", (), model._fill)
        kept = model.streams[stage], model.callables[stage]
        model.streams[stage], model.callables[stage] = stream, _Small(stream, kept[1].outputs)
        try:
            got = _logits(model, chunks, few, answers, stage)
        finally:
            model.streams[stage], model.callables[stage] = kept
            stream.close()
        clean = clean and stage != "trunk"
        mean = float(np.mean(np.concatenate([divergence(want[a.index], got[a.index]) for a in few])))
        found |= dict.fromkeys(schemes, mean)
    if not clean:
        _run_trunk(model, chunks, few)
    return found


def _run_trunk(model: StreamedModel, chunks: Sequence[list[int]], asked: Sequence[Asked]) -> None:
    for clip in sorted({a.clip for a in asked}):
        model.streams["trunk"].run(chunks[clip], model.values)


def _spread(asked: Sequence[Asked]) -> list[Asked]:
    at = np.linspace(0, len(asked) - 1, min(SAMPLES, len(asked))).round().astype(int)
    return [asked[i] for i in dict.fromkeys(at.tolist())]


def _logits(
    model: StreamedModel,
    chunks: Sequence[list[int]],
    asked: Sequence[Asked],
    answers: dict[int, list[int]],
    changed: str,
) -> dict[int, np.ndarray]:
    """Logits of the last prompt position and of every answer token, from the changed stage on; what comes before it is in the store."""
    if changed == "trunk":
        _run_trunk(model, chunks, asked)
    if changed in ("trunk", "temporal"):
        for clip in sorted({a.clip for a in asked}):
            model.values.put(clip, "sensitivity.features", model.features(chunks[clip]))
    for a in asked:
        if changed != "decoder":
            features = model.values.get(
                a.clip, "sensitivity.features" if changed in ("trunk", "temporal") else "features"
            )
            model.put_prompt(a.index, model.embeds(features, a.question, answers[a.index])[0])
        else:
            model.put_prompt(
                a.index, model.embeds(model.values.get(a.clip, "features"), a.question, answers[a.index])[0]
            )
    logits = model.logits([a.index for a in asked])
    return {a.index: logits[a.index][-(len(answers[a.index]) + 1) :] for a in asked}
