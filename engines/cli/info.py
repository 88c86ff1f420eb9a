"""ppllava-info: what is in a bundle, checked."""

from __future__ import annotations

import json
from typing import Any

import click
import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import find_engine
from ppllava_edge.engines.targets.select import TARGETS
from ppllava_edge.engines.terminal import Command, fail, human_bytes, table


def describe(bundle: Bundle) -> dict[str, str]:
    """The facts people ask for, by name."""
    m = bundle.manifest
    v, p, d = m.vision, m.pooling, m.decoder
    adapter = f", temporal adapter up to {v.max_frames} frames" if v.max_frames else ""
    facts = {
        "name": m.name,
        "family": m.family,
        "vision": f"{v.image_size} px, {v.grid[0]}x{v.grid[1]} patches, width {v.hidden_size}{adapter}",
        "frames": f"{v.default_frames} by default",
        "pooling": p.method + (f", temperature {p.temperature:g}" if p.guided else ""),
    }
    if p.windowed:
        facts |= {"video windows": str(p.video), "image windows": str(p.image)}
        output, *_ = (
            p.video.resolve((v.default_frames, *v.grid))
            if v.default_frames >= p.video.min_frames()
            else ((0, 0, 0),)
        )
        facts["visual tokens"] = (
            f"{output[0]}x{output[1]}x{output[2]} = {output[0] * output[1] * output[2]} at {v.default_frames} frames"
        )
    if m.question:
        facts["question tower"] = f"up to {m.question.length} tokens, embedding {m.question.embedding_size}"
    kv = 2 * d.layers * d.kv_heads * d.head_size * np.dtype(d.kv_dtype).itemsize
    facts |= {
        "decoder": f"{d.layers} layers x {d.hidden_size}, {d.vocab} tokens, context {d.context}",
        "KV cache": f"{human_bytes(kv)} a token, {human_bytes(kv * 1280)} at 1280",
        "precision": ", ".join(f"{part} {kind}" for part, kind in m.precision.items()),
        "tokenizers": "yes" if m.tokenizer else "no (token ids only)",
        "checkpoint": f"{m.checkpoint.get('name', '?')}, sha256 {str(m.checkpoint.get('sha256', '?'))[:16]}…",
        "parity with the float model": _parity(m.parity),
        "engines": _engines(bundle),
        "written by": m.created_by,
        "size": human_bytes(bundle.total_bytes),
    }
    return facts


def _parity(parity: dict[str, Any] | None) -> str:
    if parity is None:
        return "not measured"
    return "the gate holds" if parity.get("holds") else f"DRIFTS: {parity.get('drift', '')}"


def _engines(bundle: Bundle) -> str:
    found = []
    for target in TARGETS:
        engine, why = find_engine(bundle, target, verify=True)
        if engine or why:
            found.append(target if engine else f"{target}, not used: {why}")
    return "; ".join(found) or "none"


def check_graphs(bundle: Bundle) -> None:
    """Whether every graph opens and has the shapes that the manifest promises. Raises BundleError or EngineError."""
    from ppllava_edge.engines.backends.contract import check_stage
    from ppllava_edge.engines.backends.onnxruntime_stage import Stage

    for file in bundle.manifest.required_files():
        if file.endswith(".onnx"):
            check_stage(file.removesuffix(".onnx"), [Stage(bundle.file(file))], bundle.manifest)


def _fit(bundle: Bundle, text: str, as_json: bool) -> None:
    """Prediction and advice for a bundle that is there."""
    from ppllava_edge.engines.machine.estimate import estimate, parse_size, suggest
    from ppllava_edge.engines.machine.model_shape import shape_of

    limit = parse_size(text)
    try:
        from ppllava_edge.engines.graphs.graph import Graph
    except ImportError:
        fail("--fit reads the graphs, which needs the package onnx: pip install 'ppllava-edge[export]'")
    graphs = {
        f.removesuffix(".onnx"): Graph.read(bundle.file(f))
        for f in bundle.manifest.required_files()
        if f.endswith(".onnx")
    }
    shape = shape_of(
        graphs,
        bundle.manifest,
        bundle.manifest.files["embed_tokens.safetensors"].bytes,
        find_engine(bundle, "cpu")[0] is not None,
    )
    found, advice = estimate(shape), suggest(shape, limit, None)
    if as_json:
        click.echo(json.dumps({**vars(found), "frames": shape.frames, "advice": advice}))
        return
    table(f"{bundle.path}, {shape.frames} frames: predicted", ("what", "size"), found.rows())
    for line in advice:
        click.echo(line)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and the facts as JSON.")
@click.option(
    "--fit",
    metavar="SIZE",
    help="Predict the memory of an answer, and say what to change so that it fits, like 8GB.",
)
@click.option("--no-graphs", is_flag=True, help="Don't open the graphs (quick, and needs no engine).")
def main(bundle: str | None, as_json: bool, fit: str | None, no_graphs: bool) -> None:
    """Show what BUNDLE holds (default: the packed demonstration model), and check hashes and shapes."""
    if bundle is None:
        from ppllava_edge.engines.bundle.packed import packed_bundle

        bundle = str(packed_bundle())
    if fit is not None:
        _fit(Bundle.open(bundle), fit, as_json)
        return
    opened = Bundle.open(bundle, verify=True)
    if not no_graphs:
        check_graphs(opened)
    checked = "names, sizes, hashes" + ("" if no_graphs else ", shapes")
    facts: dict[str, Any] = {**describe(opened), "checked": f"{checked}: as the manifest says"}
    if as_json:
        click.echo(
            json.dumps(
                {
                    "bundle": str(bundle),
                    "bytes": opened.total_bytes,
                    "facts": facts,
                    "manifest": opened.manifest.as_json(),
                }
            )
        )
        return
    table(str(bundle), ("what", "value"), list(facts.items()))
    table(
        "files",
        ("file", "bytes", "sha256"),
        [(n, f"{f.bytes:,}", f.sha256[:16] + "…") for n, f in sorted(opened.manifest.files.items())],
    )


if __name__ == "__main__":
    main()
