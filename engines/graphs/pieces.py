"""Split a stage's graph between its layers, where the whole does not fit in memory at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import ONNX_TYPE

# Value name → type and shape of the values that cross a cut; the entry "" is the default.
Carried = Mapping[str, tuple[str, tuple[int | str, ...]]]
FLOAT_OF_ANY_SHAPE: Carried = {"": ("float32", ())}
RECOMPUTED = ("Shape", "Add", "Sub", "Cast")
UNLIMITED = 1 << 62


@dataclass
class Segment:
    """Consecutive layers of a stage, as a graph.

    Attributes:
        graph: The layers.
        reads: Values from earlier segments, or the stage's inputs.
        gives: Values that later segments read, or the stage's outputs.
    """

    graph: Graph
    reads: list[str]
    gives: list[str]


def split(
    g: Graph, taps: Sequence[str] = (), budget: int = UNLIMITED, carried: Carried = FLOAT_OF_ANY_SHAPE
) -> list[Segment]:
    """Split a stage between its layers.

    Args:
        g: The stage's graph; it is not changed.
        taps: Values that become outputs of the segment that produces them.
        budget: Maximum bytes of weights in a segment. A layer is never split: one layer may exceed it.
        carried: Types and shapes of the values that go from one segment to the next.

    Returns:
        The segments in order. Every node is in exactly one of them, except for sizes and positions, which
        each segment computes again.
    """
    pieces: list[list[onnx.NodeProto]] = []
    placed = set[str]()  # weights, each counted where it is used first
    piece_bytes = 0
    for layer in _layers(g):
        names = {name for node in layer for name in node.input if name in g.weights} - placed
        layer_bytes = sum(g.weights[name].bytes for name in names)
        # Nodes without weights go with the layer after them.
        if pieces and (piece_bytes + layer_bytes <= budget or not piece_bytes):
            pieces[-1] += layer
            piece_bytes += layer_bytes
        else:
            pieces.append(list(layer))
            piece_bytes = layer_bytes
        placed |= names
    return _segments(g, pieces, set(taps), carried)


def _layers(g: Graph) -> list[list[onnx.NodeProto]]:
    """Runs of nodes with the same scope ("layers.3/…"); a node without a scope joins the run before it."""
    layers: list[list[onnx.NodeProto]] = []
    current = ""
    for node in g.nodes:
        scope = node.name.rsplit("/", 1)[0] if "/" in node.name else current
        if not layers or scope != current:
            layers.append([])
            current = scope
        layers[-1].append(node)
    return layers


def _segments(
    g: Graph, pieces: list[list[onnx.NodeProto]], taps: set[str], carried: Carried
) -> list[Segment]:
    producers = g.producers()
    pieces = [_with_bookkeeping(piece, producers) for piece in pieces]
    produced = [{name for node in piece for name in node.output} for piece in pieces]
    read = [{name for node in piece for name in node.input} for piece in pieces]
    inputs = {value.name: value for value in g.inputs}
    results = {value.name: value for value in g.outputs}
    segments = []
    for i, piece in enumerate(pieces):
        used = list(dict.fromkeys(name for node in piece for name in node.input if name))
        reads = [n for n in used if n not in produced[i] and n not in g.weights and n not in g.constants]
        read_later = set[str]().union(*read[i + 1 :])
        produced_later = set[str]().union(*produced[i + 1 :])
        crossing = (read_later - produced_later) | set(results)
        outputs = [name for node in piece for name in node.output]
        gives = [name for name in outputs if name in crossing]
        shown = list(dict.fromkeys([*gives, *(name for name in outputs if name in taps)]))
        part = _part(g, f"{g.name}-{i}", piece, used)
        part.inputs = [inputs.get(name) or _value(name, carried) for name in reads]
        if i == 0 and len(pieces) > 1:  # inputs that no node reads remain part of the stage's interface
            unread = set(inputs) - set[str]().union(*read)
            part.inputs = [value for value in g.inputs if value.name in unread] + part.inputs
        part.outputs = [results.get(name) or _value(name, carried) for name in shown]
        segments.append(Segment(part, reads, gives))
    return segments


def _part(g: Graph, name: str, nodes: list[onnx.NodeProto], used: list[str]) -> Graph:
    """A graph of some of g's nodes with their weights and constants; inputs and outputs are not set."""
    part = Graph(name, g.dtype)
    part.nodes = list(nodes)
    part.functions = list(g.functions)
    part.domains = set(g.domains)
    part.opset = g.opset
    part.ir_version = g.ir_version
    part.weights = {n: g.weights[n] for n in used if n in g.weights}
    part.constants = {n: g.constants[n] for n in used if n in g.constants}
    return part


def _value(name: str, carried: Carried) -> onnx.ValueInfoProto:
    dtype, shape = carried.get(name) or carried[""]
    return helper.make_tensor_value_info(name, ONNX_TYPE[dtype], list(shape) or None)


def _with_bookkeeping(
    piece: list[onnx.NodeProto], producers: dict[str, onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """Add the sizes and positions that a piece reads: recomputing them is cheaper than carrying them over."""
    available = {name for node in piece for name in node.output}
    front: list[onnx.NodeProto] = []

    def pull(name: str) -> None:
        node = producers.get(name)
        if node is None or name in available or "/" in node.name or node.op_type not in RECOMPUTED:
            return
        available.update(node.output)
        for needed in node.input:
            pull(needed)
        front.append(node)

    for node in piece:
        for name in node.input:
            pull(name)
    return front + piece
