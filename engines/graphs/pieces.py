"""Cutting a stage's graph between its layers, for whoever can't have all of it in memory at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from ppllava_edge.engines.graphs.graph import ONNX_TYPE, Graph


@dataclass
class Segment:
    """Some consecutive layers: a graph of its own. reads: values from before; gives: values that later segments or the stage need."""

    graph: Graph
    reads: list[str]
    gives: list[str]


Carried = Mapping[
    str, tuple[str, tuple[int | str, ...]]
]  # value → type and shape; "": of all that aren't named
FLOAT_OF_ANY_SHAPE: Carried = {"": ("float32", ())}


def split(
    g: Graph, taps: Sequence[str] = (), budget: int = 1 << 62, carried: Carried = FLOAT_OF_ANY_SHAPE
) -> list[Segment]:
    """Cut a stage between its layers, so that the weights of a piece stay below budget bytes where a single layer does.

    taps: values that should be outputs of their segment too. carried: what is known of the values that go from piece to piece. g is left as
    it is.
    """
    runs, seen = _layer_runs(g), set[str]()
    pieces: list[list[onnx.NodeProto]] = []
    weight = 0
    for run in runs:
        names = {name for node in run for name in node.input if name in g.weights} - seen
        size = sum(g.weights[name].bytes for name in names)
        if pieces and (
            weight + size <= budget or not weight
        ):  # what has no weights goes with what follows it
            pieces[-1] += run
            weight += size
        else:
            pieces.append(list(run))
            weight = size
        seen |= names
    return _as_graphs(g, pieces, set(taps), carried)


def _layer_runs(g: Graph) -> list[list[onnx.NodeProto]]:
    """Nodes in runs of one scope ("layers.3/…", "pair0/time/…"); nodes without a scope go with what stands before them."""
    runs: list[list[onnx.NodeProto]] = []
    current = ""
    for node in g.nodes:
        scope = node.name.rsplit("/", 1)[0] if "/" in node.name else current
        if not runs or scope != current:
            runs.append([])
            current = scope
        runs[-1].append(node)
    return runs


def _as_graphs(
    g: Graph, pieces: list[list[onnx.NodeProto]], taps: set[str], carried: Carried
) -> list[Segment]:
    producers, outputs = g.producers(), {v.name: v for v in g.outputs}
    pieces = [_with_bookkeeping(piece, producers) for piece in pieces]
    made_by = [{name for node in piece for name in node.output} for piece in pieces]
    inputs = {v.name: v for v in g.inputs}
    everything_read = {name for piece in pieces for node in piece for name in node.input}
    segments = []
    for i, piece in enumerate(pieces):
        used_here = list(dict.fromkeys(name for node in piece for name in node.input if name))
        used_later = {name for later in pieces[i + 1 :] for node in later for name in node.input}
        later_made = {name for made in made_by[i + 1 :] for name in made}
        reads = [
            name
            for name in used_here
            if name not in made_by[i] and name not in g.weights and name not in g.constants
        ]
        gives = [
            name
            for node in piece
            for name in node.output
            if (name in used_later and name not in later_made) or name in outputs
        ]
        part = Graph(f"{g.name}-{i}", g.dtype)
        part.nodes, part.functions, part.domains = list(piece), list(g.functions), set(g.domains)
        part.opset, part.ir_version = g.opset, g.ir_version
        unread = [
            v for v in g.inputs if i == 0 and len(pieces) > 1 and v.name not in everything_read
        ]  # a stage's interface stays whole
        part.inputs = unread + [inputs.get(name) or _value(name, carried) for name in reads]
        shown = list(
            dict.fromkeys([*gives, *(name for node in piece for name in node.output if name in taps)])
        )
        part.outputs = [outputs.get(name) or _value(name, carried) for name in shown]
        part.weights = {name: g.weights[name] for name in used_here if name in g.weights}
        part.constants = {name: g.constants[name] for name in used_here if name in g.constants}
        segments.append(Segment(part, reads, gives))
    return segments


def _value(name: str, carried: Carried) -> onnx.ValueInfoProto:
    dtype, shape = carried.get(name) or carried[""]
    return helper.make_tensor_value_info(name, ONNX_TYPE[dtype], list(shape) or None)


def _with_bookkeeping(
    piece: list[onnx.NodeProto], producers: dict[str, onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """A piece with the sizes and positions that it reads from before it: cheaper to make again than to carry over."""
    made = {name for node in piece for name in node.output}
    front: list[onnx.NodeProto] = []

    def pull(name: str) -> None:
        node = producers.get(name)
        if (
            node is None
            or name in made
            or "/" in node.name
            or node.op_type not in ("Shape", "Add", "Sub", "Cast")
        ):
            return
        made.update(node.output)
        for needed in node.input:
            pull(needed)
        front.append(node)

    for node in piece:
        for name in node.input:
            pull(name)
    return front + piece
