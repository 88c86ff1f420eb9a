"""ppllava-info: what a bundle holds, after checking it."""

from __future__ import annotations

import json
from typing import Any

import click
import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import find_engine
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.bundle.packed import find_bundle
from ppllava_edge.engines.bundle.untrusted import printable
from ppllava_edge.engines.targets.select import TARGETS
from ppllava_edge.engines.terminal import Command, fail, human_bytes, table

USUAL_CAPACITY = 1280  # positions, for the size of the KV cache


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and the facts as JSON.")
@click.option(
    "--fit",
    metavar="SIZE",
    help="Predict the memory of an answer, and say what to change so that it fits in SIZE, like 8GB.",
)
@click.option("--no-graphs", is_flag=True, help="Don't open the graphs (quick, and needs no engine).")
def main(bundle: str | None, as_json: bool, fit: str | None, no_graphs: bool) -> None:
    """Show what BUNDLE holds, and check its hashes and shapes.

    BUNDLE is a directory, or nano (the default): the demonstration model packed with ppllava-edge.
    """
    path = find_bundle(bundle)
    if fit is not None:
        _print_fit(Bundle.open(path), fit, as_json)
        return
    opened = Bundle.open(path, verify=True)
    if not no_graphs:
        check_graphs(opened)
    checked = "names, sizes, hashes" + ("" if no_graphs else ", shapes")
    facts = {**describe(opened), "checked": f"{checked}: match the manifest"}
    if as_json:
        manifest = opened.manifest.as_json()
        contents = {"bundle": str(path), "bytes": opened.total_bytes, "facts": facts, "manifest": manifest}
        click.echo(json.dumps(contents))
        return
    table(str(path), ("what", "value"), list(facts.items()))
    files = sorted(opened.manifest.files.items())
    rows = [(name, f"{entry.bytes:,}", f"{entry.sha256[:16]}…") for name, entry in files]
    table("files", ("file", "bytes", "sha256"), rows)


def describe(bundle: Bundle) -> dict[str, str]:
    """A bundle's main facts, by name."""
    m = bundle.manifest
    v, d = m.vision, m.decoder
    adapter = f", temporal adapter up to {v.max_frames} frames" if v.max_frames else ""
    facts = {
        "name": m.name,
        "family": m.family,
        "vision": f"{v.image_size} px, {v.grid[0]}x{v.grid[1]} patches, width {v.hidden_size}{adapter}",
        "frames": f"{v.default_frames} by default",
        **_pooling_facts(m),
    }
    if m.question:
        facts["question tower"] = f"up to {m.question.length} tokens, embedding {m.question.embedding_size}"
    kv_bytes = 2 * d.layers * d.kv_heads * d.head_size * np.dtype(d.kv_dtype).itemsize
    usual = min(USUAL_CAPACITY, d.context)
    cache = f"{human_bytes(kv_bytes)} a token, {human_bytes(kv_bytes * usual)} at {usual}"
    name, sha256 = printable(m.checkpoint.get("name", "?")), printable(m.checkpoint.get("sha256", "?"))
    return facts | {
        "decoder": f"{d.layers} layers x {d.hidden_size}, vocabulary {d.vocab}, context {d.context}",
        "KV cache": cache,
        "precision": ", ".join(f"{part} {kind}" for part, kind in m.precision.items()),
        "tokenizers": "yes" if m.tokenizer else "no (token ids only)",
        "checkpoint": f"{name}, sha256 {sha256[:16]}…",
        "parity with the float model": _parity(m.parity),
        "engines": _engines(bundle),
        "written by": m.created_by,
        "size": human_bytes(bundle.total_bytes),
    }


def check_graphs(bundle: Bundle) -> None:
    """Open every graph and compare its shapes with the manifest.

    Raises:
        BundleError: The shapes don't match.
        EngineError: ONNX Runtime is missing or can't open a graph.
    """
    from ppllava_edge.engines.backends.contract import check_stage
    from ppllava_edge.engines.backends.onnxruntime_stage import Stage

    for file in bundle.manifest.required_files():
        if file.endswith(".onnx"):
            check_stage(file.removesuffix(".onnx"), [Stage(bundle.file(file))], bundle.manifest)


def _pooling_facts(m: Manifest) -> dict[str, str]:
    v, p = m.vision, m.pooling
    facts = {"pooling": p.method + (f", temperature {p.temperature:g}" if p.guided else "")}
    if not p.windowed:
        return facts
    output = (0, 0, 0)
    if v.default_frames >= p.video.min_frames():
        output, *_ = p.video.resolve((v.default_frames, *v.grid))
    t, h, w = output
    return facts | {
        "video windows": str(p.video),
        "image windows": str(p.image),
        "visual tokens": f"{t}x{h}x{w} = {t * h * w} at {v.default_frames} frames",
    }


def _parity(parity: dict[str, Any] | None) -> str:
    if parity is None:
        return "not measured"
    return "the gate holds" if parity.get("holds") else f"DRIFTS: {printable(parity.get('drift', ''))}"


def _engines(bundle: Bundle) -> str:
    texts = []
    for target in TARGETS:
        engine, problem = find_engine(bundle, target, verify=True)
        if engine is not None:
            texts.append(target)
        elif problem:
            texts.append(f"{target}, not used: {problem}")
    return "; ".join(texts) or "none"


def _print_fit(bundle: Bundle, size: str, as_json: bool) -> None:
    """Predict the memory that a bundle needs, and say what to change so that it fits."""
    from ppllava_edge.engines.machine.estimate import estimate, parse_size, suggest
    from ppllava_edge.engines.machine.model_shape import shape_of

    limit = parse_size(size)
    try:
        from ppllava_edge.engines.graphs.graph import Graph
    except ImportError:
        fail("--fit reads the graphs, which needs the package onnx: pip install 'ppllava-edge[export]'")
    files = [file for file in bundle.manifest.required_files() if file.endswith(".onnx")]
    graphs = {file.removesuffix(".onnx"): Graph.read(bundle.file(file)) for file in files}
    embeddings = bundle.manifest.files["embed_tokens.safetensors"].bytes
    has_engine = find_engine(bundle, "cpu")[0] is not None
    shape = shape_of(graphs, bundle.manifest, embeddings, has_engine)
    predicted = estimate(shape)
    advice = suggest(shape, limit, None)
    if as_json:
        click.echo(json.dumps({**vars(predicted), "frames": shape.frames, "advice": advice}))
        return
    table(f"{bundle.path}, {shape.frames} frames: predicted", ("what", "size"), predicted.rows())
    for line in advice:
        click.echo(line)


if __name__ == "__main__":
    main()
