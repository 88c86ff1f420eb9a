"""The graphs that TensorRT builds: rewritten for a target, the decoder cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import PLUGIN_STAGE
from ppllava_edge.engines.graphs.decode_step import TABLE, embedding_table, self_feeding, split_head
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.lower import lower, without_small_attention
from ppllava_edge.engines.graphs.pieces import split
from ppllava_edge.engines.graphs.plugin_node import with_plugin
from ppllava_edge.engines.graphs.tensors import Weight
from ppllava_edge.engines.targets.tensorrt.plan import PIECE_BYTES, Plan

# Resident memory of a build without weights, and per byte of weights, by their kind (docs/measurements.md).
PEAK_BASE = 350e6
PEAK_PER_BYTE = {"table": 2.6, "decoder int4": 3.1, "decoder": 4.9, "other": 3.6}


def target_graphs(plan: Plan) -> Iterator[tuple[str, str, Graph]]:
    """Yield (stage, engine's name, graph) in order. Weights are loaded only when a graph is saved."""
    bundle = plan.bundle
    lowered = plan.target == "orin-jp6"
    for file in bundle.manifest.required_files():
        if not file.endswith(".onnx"):
            continue
        stage = file.removesuffix(".onnx")
        g = without_small_attention(Graph.read(bundle.file(file)))
        if stage == "decoder":
            pieces = decoder_pieces(g, bundle, plan.target, plan.size.capacity, plan.options.piece_bytes)
            for i, piece in enumerate(pieces):
                yield stage, stage if len(pieces) == 1 else f"{stage}-{i}", piece
            continue
        yield stage, stage, lower(g) if lowered else g
        if stage == "pooling" and plan.plugin != "none":
            fused = with_plugin(g, *plan.windows)
            yield stage, PLUGIN_STAGE, lower(fused) if lowered else fused


def decoder_pieces(
    g: Graph, bundle: Bundle, target: str, capacity: int, piece_bytes: int = PIECE_BYTES
) -> list[Graph]:
    """The decoder's graphs for a target: self-feeding or lowered, the head in parts, cut between layers.

    Args:
        g: The standard decoder, without small attention.
        bundle: The bundle with the token embeddings.
        target: orin-jp6 gets a lowered decoder, the other targets a self-feeding one with an in-place KV
            cache.
        capacity: Positions of the KV cache.
        piece_bytes: Maximum bytes of weights in a graph.
    """
    g = lower(g) if target == "orin-jp6" else self_feeding(g, embedding_table(bundle, g.dtype), capacity)
    width = bundle.manifest.decoder.hidden_size
    carried = {"mask": (g.dtype, (1, 1, "s", capacity)), "": (g.dtype, (1, "s", width))}
    return [segment.graph for segment in split(split_head(g), budget=piece_bytes, carried=carried)]


def predicted_peak(stage: str, g: Graph) -> int:
    """The resident memory in bytes that building an engine from a graph is expected to need."""
    peak = PEAK_BASE
    for name, weight in g.weights.items():
        peak += PEAK_PER_BYTE[_weight_kind(stage, name, weight)] * weight.bytes
    return int(peak)


def _weight_kind(stage: str, name: str, weight: Weight) -> str:
    if name == TABLE:
        return "table"
    if stage != "decoder":
        return "other"
    return "decoder int4" if weight.dtype == "int4" else "decoder"
