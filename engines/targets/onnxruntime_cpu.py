"""What ONNX Runtime runs faster on a CPU than the standard graph: rewrites that `ppllava-build --target cpu` applies, and nothing else does.

float16            → float32 (the CPU provider would cast around every product), the KV cache excepted
INT4, INT8 weights → MatMulNBits in its own layout (else it is made at every load, and weights are in memory twice)
W8A8               → U8 activations into MatMulIntegerToFloat, bias included (S8 has no fast kernel here)
tower attention    → MultiHeadAttention (flash attention, no transposes)
decoder attention  → GroupQueryAttention with rotary embedding inside, over the same in-place cache
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ppllava_edge.engines.graphs.decode_step import several_logits
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import Tensor, Weight
from ppllava_edge.engines.graphs.rewrite import to_float32

VENDOR = "com.microsoft"


def for_cpu(g: Graph) -> Graph:
    """A rewritten copy of a stage's graph; weights are still loaded when it is saved. Inputs and outputs keep their names."""
    half_cache = any(
        v.name.startswith("past.") and v.type.tensor_type.elem_type == TensorProto.FLOAT16 for v in g.inputs
    )
    g = to_float32(several_logits(g) if any(v.name == "logits" for v in g.outputs) else g)
    g.domains.add(VENDOR)
    _integer_products(g)
    weight_only_products(g)
    tower_attention(g)
    cached_attention(g, half_cache)
    g.prune()
    return g


def _integer_products(g: Graph) -> None:
    """MatMul(Dequantize(Quantize(x)), Dequantize(W)) [+ bias] → MatMulIntegerToFloat(Quantize U8 (x), W, bias)."""
    producers, consumers = g.producers(), g.consumers()
    replaced: dict[int, list[onnx.NodeProto]] = {}
    zero = Weight(Tensor.of("u8.zero_point", np.array(128, np.uint8)), "uint8")
    quantized: dict[str, str] = {}
    for node in g.nodes:
        if node.op_type != "MatMul":
            continue
        x, w = (producers.get(name) for name in node.input)
        if x is None or w is None or x.op_type != "DequantizeLinear" or w.op_type != "DequantizeLinear":
            continue
        g.weights["u8.zero_point"] = zero
        before = producers[x.input[0]]  # QuantizeLinear
        nodes = []
        if before.output[0] not in quantized:
            quantized[before.output[0]] = before.output[0] + ".u8"
            nodes.append(
                helper.make_node(
                    "QuantizeLinear",
                    [before.input[0], before.input[1], "u8.zero_point"],
                    [quantized[before.output[0]]],
                    name=before.name + ".u8",
                )
            )
        output, bias, after = node.output[0], "", consumers.get(node.output[0], [])
        if len(after) == 1 and after[0].op_type == "Add" and after[0].input[1] in g.weights:
            bias, output = after[0].input[1], after[0].output[0]
            replaced[id(after[0])] = []
        inputs = [
            quantized[before.output[0]],
            w.input[0],
            before.input[1],
            w.input[1],
            "u8.zero_point",
            "",
            bias,
        ]
        nodes.append(
            helper.make_node("MatMulIntegerToFloat", inputs, [output], name=node.name, domain=VENDOR)
        )
        replaced[id(node)] = nodes
    g.nodes = [new for node in g.nodes for new in replaced.get(id(node), [node])]


def weight_only_products(g: Graph, scale_dtype: str = "float32", accuracy: int = 4) -> None:
    """MatMul(x, Dequantize(W)) [+ bias] → MatMulNBits, which multiplies in INT8 at accuracy level 4. scale_dtype: the type of x."""
    producers, consumers = g.producers(), g.consumers()
    replaced: dict[int, list[onnx.NodeProto]] = {}
    for node in g.nodes:
        w = producers.get(node.input[1]) if node.op_type == "MatMul" else None
        if w is None or w.op_type != "DequantizeLinear" or w.input[0] not in g.weights:
            continue
        weight, scale = g.weights[w.input[0]], g.weights[w.input[1]]
        inputs, outputs = weight.tensor.shape
        bits = 4 if weight.dtype == "int4" else 8
        block = next((a.i for a in w.attribute if a.name == "block_size"), 0) or _whole_block(inputs)
        if not block:
            continue
        packed, scales = w.input[0] + ".nbits", w.input[1] + ".nbits"
        g.weights[packed] = Weight(_nbits(weight.tensor, packed, bits, block), "uint8")
        g.weights[scales] = Weight(_nbits_scales(scale.tensor, scales, inputs // block, outputs), scale_dtype)
        after, bias, output = consumers.get(node.output[0], []), [], node.output[0]
        if len(after) == 1 and after[0].op_type == "Add" and after[0].input[1] in g.weights:
            bias, output = ["", "", after[0].input[1]], after[0].output[0]
            replaced[id(after[0])] = []
        names = [node.input[0], packed, scales, *bias]
        attributes: dict[str, Any] = {
            "K": inputs,
            "N": outputs,
            "bits": bits,
            "block_size": block,
            "accuracy_level": accuracy,
        }
        replaced[id(node)] = [
            helper.make_node("MatMulNBits", names, [output], name=node.name, domain=VENDOR, **attributes)
        ]
    g.nodes = [new for node in g.nodes for new in replaced.get(id(node), [node])]


def _whole_block(inputs: int) -> int:
    """The largest block that divides a column which has one scale; 0 if none does."""
    return next((block for block in (256, 128, 64, 32, 16) if inputs % block == 0), 0)


def _nbits(tensor: Tensor, name: str, bits: int, block: int) -> Tensor:
    """(K,N) signed → MatMulNBits' (N, K / block, bytes of a block), unsigned around 8 or 128."""
    inputs, outputs = tensor.shape
    shape = (outputs, inputs // block, block * bits // 8)

    def load() -> np.ndarray:
        stored = tensor.load()
        if bits == 8:
            return (np.asarray(stored).view(np.uint8) ^ 128).T.reshape(shape)
        rows = (
            np.asarray(stored).reshape(inputs, outputs // 2) ^ 0x88
        )  # two columns in a byte, now from 0 to 15
        low, high = rows[0::2], rows[1::2]
        columns = np.empty((outputs, inputs // 2), np.uint8)
        columns[0::2] = ((low & 15) | (high << 4)).T
        columns[1::2] = ((low >> 4) | (high & 0xF0)).T
        return columns.reshape(shape)

    return Tensor(name, shape, load)


def _nbits_scales(tensor: Tensor, name: str, blocks: int, outputs: int) -> Tensor:
    """(K / block, N), or (N,) for all blocks → (N, K / block)."""

    def load() -> np.ndarray:
        scales = np.asarray(tensor.load(), np.float32)
        return np.repeat(scales[:, None], blocks, axis=1) if scales.ndim == 1 else scales.T

    return Tensor(name, (outputs, blocks), load)


def _heads(g: Graph, producers: dict[str, onnx.NodeProto], name: str) -> tuple[str, int] | None:
    """The (b, s, heads * size) value behind a split into heads, and how many heads."""
    transpose = producers.get(name)
    reshape = (
        producers.get(transpose.input[0])
        if transpose is not None and transpose.op_type == "Transpose"
        else None
    )
    shape = g.constant(reshape.input[1]) if reshape is not None and reshape.op_type == "Reshape" else None
    if reshape is None or shape is None or len(shape) != 4:
        return None
    return reshape.input[0], int(shape[2])


def _merged(consumers: dict[str, list[onnx.NodeProto]], name: str) -> onnx.NodeProto | None:
    """The Reshape that puts heads side by side again."""
    transpose = consumers.get(name, [])
    if len(transpose) != 1 or transpose[0].op_type != "Transpose":
        return None
    reshape = consumers.get(transpose[0].output[0], [])
    return reshape[0] if len(reshape) == 1 and reshape[0].op_type == "Reshape" else None


def tower_attention(g: Graph) -> None:
    """Attention without mask and cache between Transposes → MultiHeadAttention on (b, s, width)."""
    producers, consumers = g.producers(), g.consumers()
    replaced: dict[int, list[onnx.NodeProto]] = {}
    for node in g.nodes:
        if node.op_type != "Attention" or node.domain or len(node.input) != 3:
            continue
        parts, merged = (
            [_heads(g, producers, name) for name in node.input],
            _merged(consumers, node.output[0]),
        )
        if merged is None or any(part is None for part in parts):
            continue
        values, heads = [part[0] for part in parts if part], parts[0][1] if parts[0] else 0
        scale = next(a.f for a in node.attribute if a.name == "scale")
        replaced[id(merged)] = [
            helper.make_node(
                "MultiHeadAttention",
                values,
                [merged.output[0]],
                name=node.name,
                domain=VENDOR,
                num_heads=heads,
                scale=scale,
            )
        ]
    g.nodes = [new for node in g.nodes for new in replaced.get(id(node), [node])]


def _head_size(g: Graph) -> int:
    """Of the decoder's cache; 1 for a graph without one."""
    return next(
        (v.type.tensor_type.shape.dim[3].dim_value for v in g.inputs if v.name.startswith("past.")), 1
    )


def cached_attention(g: Graph, half: bool = False) -> None:
    """RotaryEmbedding, TensorScatter and Attention → GroupQueryAttention, which writes the cache in place when past and present are one buffer.

    How much of the cache is filled comes from write_index and the length of inputs_embeds; mask and position_ids stay as inputs, unused.
    half: the cache stays float16 in a float32 graph: half the memory, and decoding, which reads all of it, is faster; prefill is slower
    (docs/measurements.md). Heads whose size isn't a multiple of 8 are left alone: the vendor's operator takes none.
    """
    if _head_size(g) % 8:
        return
    producers, consumers = g.producers(), g.consumers()
    length = helper.make_node("Shape", ["inputs_embeds"], ["new_length"], name="new_length", start=1, end=2)
    total = helper.make_node(
        "Add", ["write_index", "new_length"], ["total_length.int64"], name="total_length.int64"
    )
    g.constants["i_1_last"] = helper.make_tensor("i_1_last", TensorProto.INT64, [1], [1])
    last = helper.make_node(
        "Sub", ["total_length.int64", "i_1_last"], ["last_position.int64"], name="last_position.int64"
    )
    casts = [
        helper.make_node("Cast", [f"{name}.int64"], [name], name=name, to=TensorProto.INT32)
        for name in ("total_length", "last_position")
    ]
    replaced: dict[int, list[onnx.NodeProto]] = {}
    kept = set[str]()
    for node in g.nodes:
        if node.op_type != "Attention" or node.domain or len(node.input) != 4:
            continue
        merged = _merged(consumers, node.output[0])
        key, value = producers[node.input[1]], producers[node.input[2]]
        if key.op_type != "TensorScatter":
            continue  # an INT8 cache is restored in between: it stays with the standard operator
        rotated_q, rotated_k = producers[node.input[0]], producers[key.input[1]]
        q, k, v = (
            _heads(g, producers, name) for name in (rotated_q.input[0], rotated_k.input[0], value.input[1])
        )
        if merged is None or q is None or k is None or v is None:
            continue
        scale = next(a.f for a in node.attribute if a.name == "scale")
        new, tables, result = [q[0], k[0], v[0]], list(rotated_q.input[1:3]), merged.output[0]
        nodes = []
        if half:
            nodes = [
                helper.make_node(
                    "Cast", [name], [f"{name}.half"], name=f"{name}.half", to=TensorProto.FLOAT16
                )
                for name in new
            ]
            new, result = [f"{name}.half" for name in new], f"{result}.half"
            for i, name in enumerate(tables):
                tables[i] = f"{name}.half"
                g.weights[tables[i]] = Weight(g.weights[name].tensor, "float16")
        inputs = [*new, key.input[0], value.input[0], "last_position", "total_length", *tables]
        attributes: dict[str, Any] = {"num_heads": q[1], "kv_num_heads": k[1], "scale": scale, "do_rotary": 1}
        outputs = [result, key.output[0], value.output[0]]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention", inputs, outputs, name=node.name, domain=VENDOR, **attributes
            )
        )
        if half:
            nodes.append(
                helper.make_node("Cast", [result], [merged.output[0]], name=result, to=TensorProto.FLOAT)
            )
        replaced[id(merged)], replaced[id(key)], replaced[id(value)] = nodes, [], []
        kept |= {key.input[0], value.input[0], key.output[0], value.output[0]}
    g.nodes = [
        length,
        total,
        last,
        *casts,
        *(new for node in g.nodes for new in replaced.get(id(node), [node])),
    ]
    for value in [*g.inputs, *g.outputs]:
        if half and value.name in kept:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
