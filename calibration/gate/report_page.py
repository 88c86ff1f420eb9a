"""report.html: one self-contained page that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ppllava_edge.engines.terminal import human_bytes

HISTOGRAMS = 6  # layers that are shown with histograms
BARS = 30  # bars of the sensitivity plot
SHARED_PREFIXES = (
    "vision_tower.vision_model.",
    "multi_modal_projector.clip_text_model.",
    "multi_modal_projector.",
    "language_model.model.",
    "language_model.",
)
KINDS = {"w8a8": "INT8 × INT8", "w8": "INT8 weights", "w4": "INT4 weights", "float": "float"}
GOOD = '<span class="good">holds</span>'
BAD = '<span class="bad">fails</span>'
LAYER_COLUMNS = (
    "stage",
    "layer",
    "stored as",
    "activation range",
    "folding α",
    "activation scale",
    "weight SQNR, dB",
    "output SQNR, dB",
    "sensitivity, nats",
    "size",
    "note",
)

STYLE = """
:root {
  --ink: #1c2530; --soft: #66707c; --line: #dfe4ea; --bar: #3b76b3; --warn: #b3543b; --good: #2f7d4f;
  --ground: #fff; --card: #f6f8fa;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e3e8ee; --soft: #97a3b0; --line: #323c47; --bar: #6ea8e0; --warn: #e08a6e; --good: #6ec493;
    --ground: #14191f; --card: #1c232b;
  }
}
body {
  font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 1280px; margin: 2rem auto; padding: 0 1rem;
}
h1 { font-size: 1.5rem; margin: 0 }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p { margin: .3rem 0; color: var(--soft) }
.verdict { font-weight: 600 }
.good { color: var(--good) }
.bad { color: var(--warn) }
.scroll {
  overflow-x: auto; max-height: 34rem; overflow-y: auto; border: 1px solid var(--line); border-radius: 6px;
}
table { border-collapse: collapse; width: 100%; font-size: 13px }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
th { position: sticky; top: 0; background: var(--card); white-space: nowrap }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.k { white-space: nowrap }
code { font-size: 12px }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1rem }
.plot { background: var(--card); border-radius: 6px; padding: .6rem .8rem }
.plot b { font-size: 12px; overflow-wrap: anywhere }
svg { display: block; width: 100% }
svg text { fill: var(--soft); font-size: 11px }
.b { fill: var(--bar) }
.w { fill: var(--warn) }
"""


def page(report: Mapping[str, Any]) -> str:
    """The HTML page of a report, as `report.facts` gives it."""
    layers = report["layers"]
    sections = [
        _summary(report),
        "<h2>Parity with the float model, on held-back clips</h2>",
        _scores(report["parity"] or {}, report["limits"]),
        _sensitivity(layers),
        _worst_layers(layers),
        "<h2>All layers</h2>",
        _layer_table(layers),
        _skipped(report["calibration"]["skipped_files"]),
    ]
    title = f"{escape(report['model'])}: quantisation report"
    return (
        "<!doctype html><html lang=en><head>"
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _summary(report: Mapping[str, Any]) -> str:
    """Title, verdict, sizes and data."""
    parity = report["parity"] or {}
    layers = report["layers"]
    calibration = report["calibration"]
    verdict = GOOD
    if not parity.get("holds"):
        verdict = f'<span class="bad">does not hold: {escape(str(parity.get("drift", "")))}</span>'
    precision = ", ".join(f"{part} {kind}" for part, kind in report["precision"].items())
    counts = {kind: sum(layer["kind"] == kind for layer in layers) for kind in KINDS}
    kinds = ", ".join(f"{count} {KINDS[kind]}" for kind, count in counts.items() if count)
    before, now = human_bytes(report["fp16_bytes"]), human_bytes(report["bytes"])
    share = report["bytes"] / max(report["fp16_bytes"], 1)
    clips = f"{calibration.get('clips', 0)} clips, {len(calibration['held_back'])} of them held back to judge"
    if calibration["skipped_files"]:
        clips += f"; {len(calibration['skipped_files'])} files skipped"
    return (
        f"<h1>{escape(report['model'])}, quantised</h1><p>{escape(precision)}</p>"
        f'<p class="verdict">The parity gate {verdict}.</p>'
        f"<p>{len(layers)} layers: {kinds}. Weights: {before} in fp16, {now} quantised ({share:.0%}).</p>"
        f"<p>{clips}. {escape(report['created_by'])}.</p>"
    )


def _scores(parity: Mapping[str, Any], limits: Sequence[Mapping[str, Any]]) -> str:
    """A table of the scores with their limits."""
    rows = []
    for limit in limits:
        value = parity.get(limit["score"])
        if value is not None:
            rows.append(_score_row(limit, value))
    for name in ("feature_sqnr", "token_sqnr"):
        if parity.get(name) is not None:
            label = name.replace("_sqnr", " SQNR")
            rows.append(
                ["<td></td>", f"<td>{label}</td>", _number(f"{parity[name]:.1f} dB"), "<td></td>" * 2]
            )
    counts = ", ".join(
        f"{parity.get(key, 0)} {what}"
        for key, what in (("clips", "clips"), ("questions", "questions"), ("positions", "token positions"))
    )
    return f"{_table(('stage', 'score', 'measured', 'limit', ''), rows)}<p>{counts}.</p>"


def _score_row(limit: Mapping[str, Any], value: float) -> list[str]:
    at_least, bound = limit["at_least"], limit["bound"]
    holds = value >= bound if at_least else value <= bound
    return [
        f"<td>{limit['stage']}</td>",
        f"<td>{limit['score'].replace('_', ' ')}</td>",
        _number(f"{value:.4f}" if at_least else f"{value:.2g}"),
        _number(f"{'≥' if at_least else '≤'} {bound:g}"),
        f"<td>{GOOD if holds else BAD}</td>",
    ]


def _sensitivity(layers: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each of the most sensitive layers; nothing where sensitivity was not measured."""
    measured = [layer for layer in layers if layer["sensitivity"] is not None]
    if not measured:
        return ""
    bars = _bars(sorted(measured, key=lambda layer: -layer["sensitivity"])[:BARS])
    explanation = "Divergence of the next token (nats) when only this layer's group is quantised."
    return f"<h2>Sensitivity</h2><p>{explanation}</p>{bars}"


def _bars(layers: Sequence[Mapping[str, Any]]) -> str:
    height = 18
    largest = max(layer["sensitivity"] for layer in layers) or 1.0
    parts = []
    for i, layer in enumerate(layers):
        y = i * height
        width = 560 * layer["sensitivity"] / largest
        name = escape(short_name(layer["layer"]))
        kept = f" (kept: {KINDS[layer['kind']]})" if layer["kept"] else ""
        style = "w" if kept else "b"
        parts += [
            f'<text x="392" y="{y + 13}" text-anchor="end">{name}</text>',
            f'<rect class="{style}" x="400" y="{y + 3}" width="{width:.1f}" height="{height - 6}"/>',
            f'<text x="{406 + width:.0f}" y="{y + 13}">{layer["sensitivity"]:.2g}{kept}</text>',
        ]
    view = f"0 0 1060 {len(layers) * height + 4}"
    return f'<div class="plot"><svg viewBox="{view}">{"".join(parts)}</svg></div>'


def _worst_layers(layers: Sequence[Mapping[str, Any]]) -> str:
    """Histograms of the layers with the lowest signal-to-noise ratio at their output."""
    shown = [layer for layer in layers if layer["histograms"] and layer["output_sqnr"]]
    plots = "".join(_layer_plot(layer) for layer in sorted(shown, key=_output_sqnr)[:HISTOGRAMS])
    return (
        "<h2>Layers with the largest error at their output</h2>"
        "<p>Histograms of magnitudes after folding, counts on a logarithmic scale.</p>"
        f'<div class="plots">{plots}</div>'
    )


def _layer_plot(layer: Mapping[str, Any]) -> str:
    h = layer["histograms"]
    name = escape(short_name(layer["layer"]))
    inputs = _histogram(h["inputs"], h["largest_input"], "b", "input activations")
    weights = _histogram(h["weights"], h["largest_weight"], "w", "weights")
    facts = f"{KINDS[layer['kind']]}, {_output_sqnr(layer):.1f} dB"
    return f'<div class="plot"><b>{name}</b><p>{facts}</p>{inputs}{weights}</div>'


def _histogram(counts: Sequence[int], largest: float, style: str, label: str) -> str:
    heights = [math.log1p(count) for count in counts]
    scale = 52 / (max(heights, default=0) or 1.0)
    bars = [
        f'<rect class="{style}" x="{4 * i}" y="{56 - h * scale:.1f}" width="3.4" height="{h * scale:.1f}"/>'
        for i, h in enumerate(heights)
    ]
    axis = (
        '<text x="0" y="70">0</text>'
        f'<text x="128" y="70" text-anchor="middle">{label}</text>'
        f'<text x="256" y="70" text-anchor="end">{largest:.3g}</text>'
    )
    return f'<svg viewBox="0 0 260 74">{"".join(bars)}{axis}</svg>'


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    return _table(LAYER_COLUMNS, (_layer_row(layer) for layer in layers))


def _layer_row(layer: Mapping[str, Any]) -> list[str]:
    kind = KINDS[layer["kind"]]
    if layer["block"]:
        kind += f", blocks of {layer['block']}"
    return [
        f"<td>{layer['stage']}</td>",
        f"<td><code>{escape(short_name(layer['layer']))}</code></td>",
        f"<td class=k>{kind}</td>",
        f"<td class=k>{escape(layer['range'] or '')}</td>",
        _number(_format(layer["alpha"], "g")),
        _number(_format(layer["activation_scale"], ".3g")),
        _number(_format(layer["weight_sqnr"], ".1f")),
        _number(f"{_output_sqnr(layer):.1f}" if layer["output_sqnr"] else ""),
        _number(_format(layer["sensitivity"], ".2g")),
        _number(human_bytes(layer["bytes"])),
        f"<td>{escape(layer['kept'] or layer['why'] or '')}</td>",
    ]


def _skipped(files: Sequence[Mapping[str, str]]) -> str:
    """A table of the files that could not be used; nothing if there are none."""
    if not files:
        return ""
    rows = ([f"<td>{escape(f['file'])}</td>", f"<td>{escape(f['why'])}</td>"] for f in files)
    return f"<h2>Skipped files</h2>{_table(('file', 'reason'), rows)}"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _number(text: str) -> str:
    return f"<td class=n>{text}</td>"


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _output_sqnr(layer: Mapping[str, Any]) -> float:
    """Decibels at the output for the kind that was written, or the lowest known."""
    known = layer["output_sqnr"]
    return float(known.get(layer["kind"], min(known.values(), default=99.0)))


def short_name(name: str) -> str:
    """A weight's name without the parts that all names of its stage share."""
    for prefix in SHARED_PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    return name.removesuffix(".weight")
