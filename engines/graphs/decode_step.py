"""The decoder's graph as engines want it: logits of several positions; on a GPU fed by its own output, cache of fixed length, head in parts.

In the standard graph embeddings, mask and the choice of the next token stand outside. Here they are inside, so that between two steps
nothing crosses to the host but a token id:

    token_ids (1,s) int64, is_text (1,s,1) bool, inputs_embeds (1,s,D)   a position is either a token or a row that is given (visual)
    position_ids (1,s) int64, write_index (1) int64                      consecutive positions; where in the cache they go
    → next_token (1,1) int64, next_position (1,1), next_write_index (1)  what the next step takes, as it takes it
    → best (n,1) int64                                                   the likeliest token after each of the last n positions
    → top_values (1,k) float32, top_ids (1,k) int64, logits (n,V)        for sampling (top: of the last position)
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors import safe_open

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import LAST_POSITIONS
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import SCALE, Tensor, Weight

TOP_K = 64  # candidates that sampling on the host gets
HEAD_BYTES = (
    256 << 20
)  # of a piece of the head, in float16: one piece of 1 GB can't be allocated on a small board
TABLE = "embed_tokens.table"


def several_logits(g: Graph) -> Graph:
    """A copy of decoder.onnx whose logits are (n, V), of the last n = min(s, 8) positions, instead of the last one's.

    Eight rows of the head cost as much as one: its weights are read once. Raises EngineError if the graph's end isn't as export writes it.
    """
    g = g.copy()
    producers = g.producers()
    node = producers["logits"]
    while node.op_type != "Gather":
        node = producers.get(node.input[0]) or _unknown_end(g)
    node.CopyFrom(
        helper.make_node(
            "Slice",
            [node.input[0], g.ints(-LAST_POSITIONS), g.ints(1 << 62), g.ints(1)],
            list(node.output),
            name=node.name,
        )
    )
    for end in [n for n in g.nodes if "logits" in n.output]:
        end.output[list(end.output).index("logits")] = "logits.3d"
    vocab = next(v for v in g.outputs if v.name == "logits").type.tensor_type.shape.dim[1].dim_value
    g.outputs = [v for v in g.outputs if v.name != "logits"]
    g.op("Squeeze", "logits.3d", g.ints(0), output="logits")
    g.outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", vocab]))
    return g


def _unknown_end(g: Graph) -> onnx.NodeProto:
    raise EngineError(
        f"{g.name}: the logits don't come from the last position; the bundle was written by another version, export it again"
    )


def self_feeding(g: Graph, table: Tensor, capacity: int | None = None) -> Graph:
    """A copy of decoder.onnx that embeds token ids, masks and chooses by itself. table: (V, D) token embeddings; capacity: of its cache, None:
    it stays symbolic."""
    g = several_logits(g)
    if capacity:
        fix_capacity(g, capacity)
    hidden = {"float32": float("-inf"), "float16": -1e4}[g.dtype]
    for node in g.nodes:
        for i, name in enumerate(node.input):
            node.input[i] = "embeds" if name == "inputs_embeds" else name
    g.inputs = [v for v in g.inputs if v.name != "mask"]
    body, g.nodes = g.nodes, []
    g.input("token_ids", "int64", [1, "s"])
    g.input("is_text", "bool", [1, "s", 1])
    rows = g.Gather(g.weight(Tensor(TABLE, table.shape, table.load)), "token_ids", axis=0)
    g.op("Where", "is_text", rows, "inputs_embeds", output="embeds")
    if capacity:
        columns = g.weight(Tensor.of("columns", np.arange(capacity, dtype=np.int64)), "int64")
    else:
        columns = g.Range(g.integer(0), g.Squeeze(g.Shape("past.0.key", start=2, end=3)), g.integer(1))
    visible = g.LessOrEqual(columns, g.Unsqueeze("position_ids", g.ints(1, 3)))
    g.op("Where", visible, g.number(0.0), g.number(hidden), output="mask")
    g.nodes += body
    best = g.op("ArgMax", "logits", output="best", axis=1, keepdims=1)
    last = g.Gather("logits", g.ints(-1), axis=0)
    g.output(g.Gather(best, g.ints(-1), axis=0), "next_token", "int64", [1, 1])
    count = min(TOP_K, table.shape[0])
    g.nodes.append(
        helper.make_node("TopK", [last, g.ints(count)], ["top_values", "top_ids"], name="TopK", axis=1)
    )
    position = g.Gather("position_ids", g.ints(-1), axis=1)
    g.output(g.Add(position, g.ints(1)), "next_position", "int64", [1, 1])
    g.output(g.Add("write_index", g.Shape("position_ids", start=1, end=2)), "next_write_index", "int64", [1])
    g.outputs.append(helper.make_tensor_value_info("best", TensorProto.INT64, ["n", 1]))
    g.outputs.append(helper.make_tensor_value_info("top_values", TensorProto.FLOAT, [1, count]))
    g.outputs.append(helper.make_tensor_value_info("top_ids", TensorProto.INT64, [1, count]))
    g.prune()
    return g


def embedding_table(bundle: Bundle, dtype: str) -> Tensor:
    """(V, D) token embeddings in a floating type, restored where the bundle has them as INT8."""
    d, path = bundle.manifest.decoder, bundle.file("embed_tokens.safetensors")

    def load() -> np.ndarray:
        with safe_open(path, "np") as file:
            rows = file.get_tensor("embed_tokens").astype(dtype)
            names = file.keys()
            return (
                rows * file.get_tensor("embed_tokens.scale").astype(dtype)[:, None]
                if "embed_tokens.scale" in names
                else rows
            )

    return Tensor(TABLE, (d.vocab, d.hidden_size), load)


def fix_capacity(g: Graph, capacity: int) -> None:
    """Give the cache a length: TensorRT wants a static one."""
    for value in [*g.inputs, *g.outputs]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "capacity":
                dimension.dim_value = capacity


def split_head(g: Graph, part_bytes: int = HEAD_BYTES) -> Graph:
    """A copy whose head (hidden → logits) is several products side by side, none larger than part_bytes in float16."""
    g = g.copy()
    producers = g.producers()
    head = next((n for n in reversed(g.nodes) if n.op_type == "MatMul"), None)
    if head is None:
        return g
    dequantize = producers.get(head.input[1])
    weight = g.weights[dequantize.input[0] if dequantize is not None else head.input[1]]
    inputs, outputs = weight.tensor.shape
    parts = -(-inputs * outputs * 2 // part_bytes)
    if parts < 2:
        return g
    width = -(-outputs // parts // 2) * 2  # even: INT4 stores two columns in a byte
    edges = [*range(0, outputs, width), outputs]
    nodes, names = list[onnx.NodeProto](), list[str]()
    for i, (first, last) in enumerate(pairwise(edges)):
        suffix = f".part{i}"
        if dequantize is None:
            right = _columns(g, head.input[1], first, last, suffix)
        else:
            stored, scale = (_columns(g, name, first, last, suffix) for name in dequantize.input[:2])
            right = f"{dequantize.output[0]}{suffix}"
            one = helper.make_node(
                "DequantizeLinear", [stored, scale], [right], name=dequantize.name + suffix
            )
            one.attribute.extend(dequantize.attribute)
            nodes.append(one)
        names.append(f"{head.output[0]}{suffix}")
        nodes.append(helper.make_node("MatMul", [head.input[0], right], [names[-1]], name=head.name + suffix))
    nodes.append(helper.make_node("Concat", names, [head.output[0]], name=head.name + ".whole", axis=-1))
    gone = [head] if dequantize is None else [head, dequantize]
    at = g.nodes.index(head)
    g.nodes[at : at + 1] = nodes
    g.nodes = [n for n in g.nodes if n not in gone[1:]]
    g.prune()
    return g


def _columns(g: Graph, name: str, first: int, last: int, suffix: str) -> str:
    """A weight of some columns of another: matrices, INT4 packed two in a byte, scales per column or per block and column."""
    weight = g.weights[name]
    tensor, new = weight.tensor, name.removesuffix(SCALE) + suffix + (SCALE if name.endswith(SCALE) else "")

    def load() -> np.ndarray:
        array = np.asarray(tensor.load())
        if weight.dtype == "int4":
            return np.ascontiguousarray(array.reshape(tensor.shape[0], -1)[:, first // 2 : last // 2])
        return np.ascontiguousarray(array[..., first:last])

    g.weights[new] = Weight(Tensor(new, (*tensor.shape[:-1], last - first), load), weight.dtype)
    return new
