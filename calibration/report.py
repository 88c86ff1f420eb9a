"""What quantisation did and cost: report.json for programs, report.html for people. The page holds everything it shows; nothing is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ppllava_edge.calibration.choose import Choice
from ppllava_edge.calibration.data import Data
from ppllava_edge.calibration.parity import INT4_LIMITS, LIMITS
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.terminal import human_bytes
from ppllava_edge.export.quantisation.quantize import LayerRecord

WORST, BARS = 6, 30  # layers with histograms; bars of the sensitivity plot
PREFIXES = (
    "vision_tower.vision_model.",
    "multi_modal_projector.clip_text_model.",
    "multi_modal_projector.",
    "language_model.model.",
    "language_model.",
)
KINDS = {"w8a8": "INT8 × INT8", "w8": "INT8 weights", "w4": "INT4 weights", "float": "float"}

STYLE = """
:root { --ink: #1c2530; --soft: #66707c; --line: #dfe4ea; --bar: #3b76b3; --warn: #b3543b; --good: #2f7d4f; --ground: #fff; --card: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --soft: #97a3b0; --line: #323c47; --bar: #6ea8e0; --warn: #e08a6e; --good: #6ec493;
  --ground: #14191f; --card: #1c232b } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 1280px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } p { margin: .3rem 0; color: var(--soft) }
.verdict { font-weight: 600 } .good { color: var(--good) } .bad { color: var(--warn) }
.scroll { overflow-x: auto; max-height: 34rem; overflow-y: auto; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-size: 13px }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
th { position: sticky; top: 0; background: var(--card); white-space: nowrap }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } td.k { white-space: nowrap }
code { font-size: 12px } .plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1rem }
.plot { background: var(--card); border-radius: 6px; padding: .6rem .8rem } .plot b { font-size: 12px; overflow-wrap: anywhere }
svg { display: block; width: 100% }
svg text { fill: var(--soft); font-size: 11px } .b { fill: var(--bar) } .w { fill: var(--warn) }
"""


def write_report(
    folder: Path,
    manifest: Manifest,
    choices: Sequence[Choice],
    records: Mapping[str, Sequence[LayerRecord]],
    sensitivity: Mapping[str, float],
    kept: Mapping[str, str],
    data: Data,
) -> None:
    """Write both files. choices: what calibration decided; records: what was written; sensitivity: nats by weight, empty for large models."""
    told = facts(manifest, choices, records, sensitivity, kept, data)
    (folder / "report.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(told), encoding="utf-8")


def facts(
    manifest: Manifest,
    choices: Sequence[Choice],
    records: Mapping[str, Sequence[LayerRecord]],
    sensitivity: Mapping[str, float],
    kept: Mapping[str, str],
    data: Data,
) -> dict[str, Any]:
    """Everything in report.json."""
    chosen = {choice.weight: choice for choice in choices}
    layers = []
    for stage, stage_records in records.items():
        for record in stage_records:
            c = chosen.get(record.weight)
            count = record.shape[0] * record.shape[1]
            layers.append(
                {
                    "stage": stage,
                    "layer": record.weight,
                    "shape": list(record.shape),
                    "kind": record.scheme.kind,
                    "block": record.scheme.block if record.scheme.kind == "w4" else None,
                    "range": c.method if c else None,
                    "alpha": c.alpha if c else None,
                    "activation_scale": record.scheme.activation_scale or None,
                    "weight_sqnr": record.sqnr,
                    "output_sqnr": c.sqnr if c else {},
                    "sensitivity": sensitivity.get(record.weight),
                    "kept": kept.get(record.weight),
                    "why": record.scheme.why,
                    "bytes": record.bytes,
                    "fp16_bytes": 2 * count,
                    "histograms": c
                    and {
                        "inputs": c.inputs,
                        "largest_input": c.largest_input,
                        "weights": c.weights,
                        "largest_weight": c.largest_weight,
                    },
                }
            )
    int4 = manifest.precision.get("decoder") == "int4"
    limits = [
        {
            "stage": x.stage,
            "score": x.score,
            "bound": INT4_LIMITS.get(x.score, x.bound) if int4 else x.bound,
            "at_least": x.at_least,
        }
        for x in LIMITS
    ]
    return {
        "model": manifest.name,
        "created_by": manifest.created_by,
        "precision": manifest.precision,
        "parity": manifest.parity,
        "limits": limits,
        "calibration": {
            **(manifest.calibration or {}),
            "held_back": [c.name for c in data.clips if c.held_back],
            "files": [c.name for c in data.clips],
            "skipped_files": [{"file": name, "why": why} for name, why in data.skipped],
        },
        "layers": layers,
        "bytes": sum(x["bytes"] for x in layers),
        "fp16_bytes": sum(x["fp16_bytes"] for x in layers),
    }


def page(told: Mapping[str, Any]) -> str:
    """The HTML."""
    parity, layers, calibration = told["parity"] or {}, told["layers"], told["calibration"]
    verdict = (
        '<span class="good">holds</span>'
        if parity.get("holds")
        else f'<span class="bad">does not hold: {escape(str(parity.get("drift", "")))}</span>'
    )
    precision = ", ".join(f"{part} {kind}" for part, kind in told["precision"].items())
    kinds = {kind: sum(x["kind"] == kind for x in layers) for kind in KINDS}
    counts = ", ".join(f"{n} {KINDS[kind]}" for kind, n in kinds.items() if n)
    body = [
        f"<h1>{escape(told['model'])}, quantised</h1><p>{escape(precision)}</p>",
        f'<p class="verdict">The parity gate {verdict}.</p>',
        f"<p>{len(layers)} layers: {counts}. Their weights: {human_bytes(told['fp16_bytes'])} in fp16, {human_bytes(told['bytes'])} now "
        f"({told['bytes'] / max(told['fp16_bytes'], 1):.0%}).</p>",
        f"<p>{calibration.get('clips', 0)} clips, {len(calibration['held_back'])} of them held back to judge"
        + (f", {len(calibration['skipped_files'])} files skipped" if calibration["skipped_files"] else "")
        + f". {escape(told['created_by'])}.</p>",
        "<h2>Parity with the float model, on held-back clips</h2>",
        _scores(parity, told["limits"]),
    ]
    if any(x["sensitivity"] is not None for x in layers):
        body += [
            "<h2>Sensitivity</h2><p>Divergence of the next token (nats) when only this layer's group is quantised; everything else float.</p>",
            _bars(
                sorted((x for x in layers if x["sensitivity"] is not None), key=lambda x: -x["sensitivity"])[
                    :BARS
                ]
            ),
        ]
    worst = sorted((x for x in layers if x["histograms"] and x["output_sqnr"]), key=_decibels)[:WORST]
    body += [
        "<h2>The worst layers, by error at their own output</h2><p>Magnitudes on a logarithmic count, after folding: what enters, and the weights.</p>",
        '<div class="plots">',
        *(_histograms(x) for x in worst),
        "</div>",
        "<h2>Every layer</h2>",
        _layer_table(layers),
    ]
    if calibration["skipped_files"]:
        rows = "".join(
            f"<tr><td>{escape(x['file'])}</td><td>{escape(x['why'])}</td></tr>"
            for x in calibration["skipped_files"]
        )
        body += [
            "<h2>Skipped files</h2>",
            f'<div class="scroll"><table><tr><th>file</th><th>why</th></tr>{rows}</table></div>',
        ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>{escape(told['model'])}: quantisation report</title>"
    return f"<!doctype html><html lang=en><head>{head}{title}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"


def _decibels(layer: Mapping[str, Any]) -> float:
    """Error at the output under the kind that was written, or the worst known."""
    return float(layer["output_sqnr"].get(layer["kind"], min(layer["output_sqnr"].values(), default=99.0)))


def _scores(parity: Mapping[str, Any], limits: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for limit in limits:
        value = parity.get(limit["score"])
        if value is None:
            continue
        holds = value >= limit["bound"] if limit["at_least"] else value <= limit["bound"]
        sign, mark = (
            "≥" if limit["at_least"] else "≤",
            '<span class="good">holds</span>' if holds else '<span class="bad">fails</span>',
        )
        shown = f"{value:.4f}" if limit["at_least"] else f"{value:.2g}"
        bound = f"<td class=n>{shown}</td><td class=n>{sign} {limit['bound']:g}</td>"
        rows.append(
            f"<tr><td>{limit['stage']}</td><td>{limit['score'].replace('_', ' ')}</td>{bound}<td>{mark}</td></tr>"
        )
    for name in ("feature_sqnr", "token_sqnr"):
        if name in parity:
            rows.append(
                f"<tr><td></td><td>{name.replace('_', ' ').replace('sqnr', 'SQNR')}</td><td class=n>{parity[name]:.1f} dB</td><td></td><td></td></tr>"
            )
    seen = f"<p>{parity.get('clips', 0)} clips, {parity.get('questions', 0)} questions, {parity.get('positions', 0)} token positions.</p>"
    return f'<div class="scroll"><table><tr><th>stage</th><th>score</th><th>measured</th><th>limit</th><th></th></tr>{"".join(rows)}</table></div>{seen}'


def _bars(layers: Sequence[Mapping[str, Any]]) -> str:
    most, height = max((x["sensitivity"] for x in layers), default=0) or 1.0, 18
    rows = []
    for i, x in enumerate(layers):
        y, width = i * height, 560 * x["sensitivity"] / most
        kept = f" (kept: {KINDS[x['kind']]})" if x["kept"] else ""
        rows += [
            f'<text x="392" y="{y + 13}" text-anchor="end">{escape(short(x["layer"]))}</text>',
            f'<rect class="{"w" if kept else "b"}" x="400" y="{y + 3}" width="{width:.1f}" height="{height - 6}"/>',
            f'<text x="{406 + width:.0f}" y="{y + 13}">{x["sensitivity"]:.2g}{kept}</text>',
        ]
    return f'<div class="plot"><svg viewBox="0 0 1060 {len(layers) * height + 4}">{"".join(rows)}</svg></div>'


def _histograms(layer: Mapping[str, Any]) -> str:
    h = layer["histograms"]
    inputs = _histogram(h["inputs"], h["largest_input"], "b", "what enters")
    weights = _histogram(h["weights"], h["largest_weight"], "w", "weights")
    return f'<div class="plot"><b>{escape(short(layer["layer"]))}</b><p>{KINDS[layer["kind"]]}, {_decibels(layer):.1f} dB</p>{inputs}{weights}</div>'


def _histogram(counts: Sequence[int], largest: float, style: str, label: str) -> str:
    heights = [math.log1p(c) for c in counts]
    most = max(heights, default=0) or 1.0
    bars = [
        f'<rect class="{style}" x="{4 * i}" y="{56 - 52 * h / most:.1f}" width="3.4" height="{52 * h / most:.1f}"/>'
        for i, h in enumerate(heights)
    ]
    axis = f'<text x="0" y="70">0</text><text x="128" y="70" text-anchor="middle">{label}</text><text x="256" y="70" text-anchor="end">{largest:.3g}</text>'
    return f'<svg viewBox="0 0 260 74">{"".join(bars)}{axis}</svg>'


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for x in layers:
        scale = f"{x['activation_scale']:.3g}" if x["activation_scale"] else ""
        weight = "" if x["weight_sqnr"] is None else f"{x['weight_sqnr']:.1f}"
        output = f"{_decibels(x):.1f}" if x["output_sqnr"] else ""
        kind = KINDS[x["kind"]] + (f", blocks of {x['block']}" if x["block"] else "")
        sensitivity = "" if x["sensitivity"] is None else f"{x['sensitivity']:.2g}"
        cells = (x["range"] or "", "" if x["alpha"] is None else f"{x['alpha']:g}")
        rows.append(
            f"<tr><td>{x['stage']}</td><td><code>{escape(short(x['layer']))}</code></td><td class=k>{kind}</td>"
            f"<td class=k>{escape(cells[0])}</td><td class=n>{cells[1]}</td><td class=n>{scale}</td>"
            f"<td class=n>{weight}</td><td class=n>{output}</td><td class=n>{sensitivity}</td>"
            f"<td class=n>{human_bytes(x['bytes'])}</td><td>{escape(x['kept'] or x['why'] or '')}</td></tr>"
        )
    heads = (
        "stage",
        "layer",
        "stored as",
        "range",
        "fold α",
        "input scale",
        "weight dB",
        "output dB",
        "nats",
        "size",
        "kept, and why",
    )
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{h}</th>" for h in heads)}</tr>{"".join(rows)}</table></div>'


def short(name: str) -> str:
    """A weight's name without the parts that all names share."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    return name.removesuffix(".weight")
