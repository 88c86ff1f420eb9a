"""The report of a quantisation and its accuracy: report.json for programs, report.html for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppllava_edge.calibration.data import Data
from ppllava_edge.calibration.gate.parity import Scores, limits
from ppllava_edge.calibration.gate.report_page import page
from ppllava_edge.calibration.layer_choice import Choice
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.export.quantisation.plan import LayerRecord


@dataclass
class Outcome:
    """The decisions of a calibration and the result of the parity gate.

    Attributes:
        choices: One choice per layer.
        sensitivity: Weight name → divergence (nats) when only its group is quantised; empty for large models.
        kept: Weight name → why the layer keeps higher precision.
        scores: Scores of the written bundle.
        violations: Limits that don't hold, in words; "" if the gate holds.
    """

    choices: list[Choice]
    sensitivity: dict[str, float] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    scores: Scores | None = None
    violations: str = ""


def write_report(
    folder: Path,
    manifest: Manifest,
    outcome: Outcome,
    records: Mapping[str, Sequence[LayerRecord]],
    data: Data,
) -> None:
    """Write report.json and report.html.

    Args:
        folder: Folder for both files.
        manifest: Manifest that includes the scores.
        outcome: Decisions and scores.
        records: Stage → how each of its layers was stored.
        data: Calibration clips.
    """
    report = facts(manifest, outcome, records, data)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(report), encoding="utf-8")


def facts(
    manifest: Manifest, outcome: Outcome, records: Mapping[str, Sequence[LayerRecord]], data: Data
) -> dict[str, Any]:
    """The contents of report.json."""
    choices = {choice.weight: choice for choice in outcome.choices}
    layers = [
        _layer(stage, record, choices.get(record.weight), outcome)
        for stage, stage_records in records.items()
        for record in stage_records
    ]
    return {
        "model": manifest.name,
        "created_by": manifest.created_by,
        "precision": manifest.precision,
        "parity": manifest.parity,
        "limits": [vars(limit) for limit in limits(manifest.precision.get("decoder") == "int4")],
        "calibration": {
            **(manifest.calibration or {}),
            "held_back": [clip.name for clip in data.clips if clip.held_back],
            "files": [clip.name for clip in data.clips],
            "skipped_files": [{"file": name, "why": why} for name, why in data.skipped],
        },
        "layers": layers,
        "bytes": sum(layer["bytes"] for layer in layers),
        "fp16_bytes": sum(layer["fp16_bytes"] for layer in layers),
    }


def _layer(stage: str, record: LayerRecord, choice: Choice | None, outcome: Outcome) -> dict[str, Any]:
    """One layer of report.json; choice: None for a layer that was not calibrated."""
    scheme = record.scheme
    return {
        "stage": stage,
        "layer": record.weight,
        "shape": list(record.shape),
        "kind": scheme.kind,
        "block": scheme.block if scheme.kind == "w4" else None,
        "range": choice.method if choice else None,
        "alpha": choice.alpha if choice else None,
        "activation_scale": scheme.activation_scale or None,
        "weight_sqnr": record.sqnr,
        "output_sqnr": choice.sqnr if choice else {},
        "sensitivity": outcome.sensitivity.get(record.weight),
        "kept": outcome.kept.get(record.weight),
        "why": scheme.why,
        "bytes": record.bytes,
        "fp16_bytes": 2 * record.shape[0] * record.shape[1],
        "histograms": _histograms(choice) if choice else None,
    }


def _histograms(choice: Choice) -> dict[str, Any]:
    return {
        "inputs": choice.inputs,
        "largest_input": choice.largest_input,
        "weights": choice.weights,
        "largest_weight": choice.largest_weight,
    }
