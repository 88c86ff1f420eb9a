"""The decoder's graph for engines: logits of several positions, and a decode step that feeds itself on a GPU.

In the standard graph the caller embeds tokens, builds the mask and chooses the next token. The self-feeding
graph does all three, so that between two steps only a token id goes to the host:

    token_ids (1,s) int64, is_text (1,s,1) bool, inputs_embeds (1,s,D)   per position: a token or a given row
    position_ids (1,s) int64, write_index (1) int64                      consecutive; where to write the cache
    → next_token (1,1) int64, next_position (1,1), next_write_index (1)  the inputs of the next step
    → best (n,1) int64                                                   most likely token, last n positions
    → top_values (1,k) float32, top_ids (1,k) int64, logits (n,V)        for sampling; top_*: last position
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
from onnx import TensorProto, helper

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.embeddings import SCALES, open_embeddings
from ppllava_edge.engines.bundle.embeddings import TABLE as EMBEDDINGS
from ppllava_edge.engines.bundle.engine_manifest import LAST_POSITIONS
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import SCALE, Tensor, Weight

TOP_K = 64  # candidates for sampling on the host
HEAD_BYTES = 256 << 20  # float16 weights per part of the head: a small board can't allocate 1 GB at once
TABLE = "embed_tokens.table"
HIDDEN = {"float32": float("-inf"), "float16": -1e4}  # mask value of positions that must not be attended to


def several_logits(g: Graph) -> Graph:
    """A copy of decoder.onnx with logits (n, V) of the last n = min(s, 8) positions instead of one.

    Eight rows cost about as much as one: the head's weights are read once.

    Raises:
        EngineError: If the graph doesn't end as export writes it.
    """
    g = g.copy()
    producers = g.producers()
    node = producers["logits"]
    while node.op_type != "Gather":
        node = producers.get(node.input[0]) or _unknown_end(g)
    last_positions = [node.input[0], g.ints(-LAST_POSITIONS), g.ints(1 << 62), g.ints(1)]
    node.CopyFrom(helper.make_node("Slice", last_positions, list(node.output), name=node.name))
    for end in [n for n in g.nodes if "logits" in n.output]:
        end.output[list(end.output).index("logits")] = "logits.3d"
    vocab = next(v for v in g.outputs if v.name == "logits").type.tensor_type.shape.dim[1].dim_value
    g.outputs = [v for v in g.outputs if v.name != "logits"]
    g.op("Squeeze", "logits.3d", g.ints(0), output="logits")
    g.outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", vocab]))
    return g


def _unknown_end(g: Graph) -> onnx.NodeProto:
    raise EngineError(
        f"{g.name}: the logits don't come from the last position; "
        f"the bundle was written by another version, export it again"
    )


def self_feeding(g: Graph, table: Tensor, capacity: int | None = None) -> Graph:
    """A copy of decoder.onnx that embeds token ids, builds the mask and chooses the next token itself.

    Args:
        g: The standard decoder.
        table: Token embeddings (V, D).
        capacity: Positions of the KV cache; None: the dimension stays symbolic.

    Raises:
        EngineError: If the graph doesn't end as export writes it.
    """
    g = several_logits(g)
    if capacity:
        fix_capacity(g, capacity)
    for node in g.nodes:
        for i, name in enumerate(node.input):
            node.input[i] = "embeds" if name == "inputs_embeds" else name
    g.inputs = [v for v in g.inputs if v.name != "mask"]
    body = g.nodes
    g.nodes = []
    _embed(g, table)
    _mask(g, capacity)
    g.nodes += body
    _choose(g, min(TOP_K, table.shape[0]))
    g.prune()
    return g


def _embed(g: Graph, table: Tensor) -> None:
    """token_ids, is_text, inputs_embeds → embeds."""
    g.input("token_ids", "int64", [1, "s"])
    g.input("is_text", "bool", [1, "s", 1])
    rows = g.Gather(g.weight(Tensor(TABLE, table.shape, table.load)), "token_ids", axis=0)
    g.op("Where", "is_text", rows, "inputs_embeds", output="embeds")


def _mask(g: Graph, capacity: int | None) -> None:
    """position_ids → mask (1, 1, s, capacity): a position sees itself and the positions before it."""
    if capacity:
        columns = g.weight(Tensor.of("columns", np.arange(capacity, dtype=np.int64)), "int64")
    else:
        columns = g.Range(g.integer(0), g.Squeeze(g.Shape("past.0.key", start=2, end=3)), g.integer(1))
    visible = g.LessOrEqual(columns, g.Unsqueeze("position_ids", g.ints(1, 3)))
    g.op("Where", visible, g.number(0.0), g.number(HIDDEN[g.dtype]), output="mask")


def _choose(g: Graph, candidates: int) -> None:
    """logits → best, next_*, top_*."""
    best = g.op("ArgMax", "logits", output="best", axis=1, keepdims=1)
    last = g.Gather("logits", g.ints(-1), axis=0)
    g.output(g.Gather(best, g.ints(-1), axis=0), "next_token", "int64", [1, 1])
    top = ["top_values", "top_ids"]
    g.nodes.append(helper.make_node("TopK", [last, g.ints(candidates)], top, name="TopK", axis=1))
    position = g.Gather("position_ids", g.ints(-1), axis=1)
    g.output(g.Add(position, g.ints(1)), "next_position", "int64", [1, 1])
    g.output(g.Add("write_index", g.Shape("position_ids", start=1, end=2)), "next_write_index", "int64", [1])
    g.outputs.append(helper.make_tensor_value_info("best", TensorProto.INT64, ["n", 1]))
    g.outputs.append(helper.make_tensor_value_info("top_values", TensorProto.FLOAT, [1, candidates]))
    g.outputs.append(helper.make_tensor_value_info("top_ids", TensorProto.INT64, [1, candidates]))


def embedding_table(bundle: Bundle, dtype: str) -> Tensor:
    """The token embeddings (V, D) of a bundle in a floating type, dequantised if they are stored as INT8.

    Raises:
        BundleError: The file can't be read, or its tensors aren't those that the manifest promises.
    """
    decoder = bundle.manifest.decoder
    open_embeddings(bundle)  # raises before any work is done

    def load() -> np.ndarray:
        with open_embeddings(bundle) as file:
            rows = file.get_tensor(EMBEDDINGS)
            if rows.dtype != np.int8:
                return rows.astype(dtype)
            return rows.astype(dtype) * file.get_tensor(SCALES).astype(dtype)[:, None]

    return Tensor(TABLE, (decoder.vocab, decoder.hidden_size), load)


def fix_capacity(g: Graph, capacity: int) -> None:
    """Set the number of positions of the KV cache: TensorRT needs a static one."""
    for value in [*g.inputs, *g.outputs]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "capacity":
                dimension.dim_value = capacity


def split_head(g: Graph, part_bytes: int = HEAD_BYTES) -> Graph:
    """A copy whose head (hidden → logits) is several products side by side.

    Args:
        g: The decoder; its head is the last MatMul.
        part_bytes: Maximum bytes of one product's weights in float16.
    """
    g = g.copy()
    head = next((n for n in reversed(g.nodes) if n.op_type == "MatMul"), None)
    if head is None:
        return g
    dequantize = g.producers().get(head.input[1])
    weight = g.weights[dequantize.input[0] if dequantize is not None else head.input[1]]
    inputs, outputs = weight.tensor.shape
    parts = -(-inputs * outputs * 2 // part_bytes)
    if parts < 2:
        return g
    width = -(-outputs // parts // 2) * 2  # even: INT4 stores two columns in a byte
    nodes: list[onnx.NodeProto] = []
    for i, columns in enumerate(pairwise([*range(0, outputs, width), outputs])):
        nodes += _head_part(g, head, dequantize, columns, f".part{i}")
    products = [node.output[0] for node in nodes if node.op_type == "MatMul"]
    nodes.append(helper.make_node("Concat", products, [head.output[0]], name=head.name + ".whole", axis=-1))
    at = g.nodes.index(head)
    g.nodes[at : at + 1] = nodes
    g.nodes = [n for n in g.nodes if n is not dequantize]
    g.prune()
    return g


def _head_part(
    g: Graph, head: onnx.NodeProto, dequantize: onnx.NodeProto | None, columns: tuple[int, int], suffix: str
) -> list[onnx.NodeProto]:
    """The product with some columns of the head's weights, dequantised first where they are quantised."""
    output = f"{head.output[0]}{suffix}"
    if dequantize is None:
        right = _columns(g, head.input[1], columns, suffix)
        return [helper.make_node("MatMul", [head.input[0], right], [output], name=head.name + suffix)]
    stored = [_columns(g, name, columns, suffix) for name in dequantize.input[:2]]  # values and scales
    right = f"{dequantize.output[0]}{suffix}"
    part = helper.make_node("DequantizeLinear", stored, [right], name=dequantize.name + suffix)
    part.attribute.extend(dequantize.attribute)
    product = helper.make_node("MatMul", [head.input[0], right], [output], name=head.name + suffix)
    return [part, product]


def _columns(g: Graph, name: str, columns: tuple[int, int], suffix: str) -> str:
    """Add some columns of a weight (matrix, packed INT4 or scales) as a new weight and return its name."""
    weight = g.weights[name]
    tensor = weight.tensor
    first, last = columns
    new = name.removesuffix(SCALE) + suffix + (SCALE if name.endswith(SCALE) else "")

    def load() -> np.ndarray:
        array = np.asarray(tensor.load())
        if weight.dtype == "int4":
            return np.ascontiguousarray(array.reshape(tensor.shape[0], -1)[:, first // 2 : last // 2])
        return np.ascontiguousarray(array[..., first:last])

    g.weights[new] = Weight(Tensor(new, (*tensor.shape[:-1], last - first), load), weight.dtype)
    return new
