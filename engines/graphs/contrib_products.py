"""Quantised matrix products as ONNX Runtime's own operators (domain com.microsoft).

W8A8         → MatMulIntegerToFloat with U8 activations, bias included
INT4, INT8   → MatMulNBits, in the layout that the operator reads
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import Tensor, Weight

CONTRIB = "com.microsoft"
ZERO_POINT = "u8.zero_point"
BLOCKS = (256, 128, 64, 32, 16)  # block sizes of MatMulNBits, largest first

# Node id → its replacements.
Replacements = dict[int, list[onnx.NodeProto]]


def replace_nodes(g: Graph, replacements: Replacements) -> None:
    """Replace nodes by id; an empty list drops the node."""
    g.nodes = [new for node in g.nodes for new in replacements.get(id(node), [node])]


def integer_products(g: Graph) -> None:
    """MatMul(Dequantize(Quantize(x)), Dequantize(W)) [+ bias] → MatMulIntegerToFloat(QuantizeU8(x), W, bias).

    Activations become unsigned because the CPU provider has no fast kernel for signed ones.
    """
    producers = g.producers()
    consumers = g.consumers()
    replacements: Replacements = {}
    unsigned: dict[str, str] = {}  # signed activations → unsigned, quantised once for all their readers
    for node in g.nodes:
        if node.op_type != "MatMul":
            continue
        x, w = (producers.get(name) for name in node.input)
        if x is None or w is None or x.op_type != "DequantizeLinear" or w.op_type != "DequantizeLinear":
            continue
        g.weights[ZERO_POINT] = Weight(Tensor.of(ZERO_POINT, np.array(128, np.uint8)), "uint8")
        quantize = producers[x.input[0]]
        signed = quantize.output[0]
        nodes = []
        if signed not in unsigned:
            unsigned[signed] = f"{signed}.u8"
            nodes.append(_unsigned(quantize, unsigned[signed]))
        bias, output = _absorb_bias(g, node, consumers, replacements)
        scale = quantize.input[1]
        inputs = [unsigned[signed], w.input[0], scale, w.input[1], ZERO_POINT, "", bias]
        nodes.append(
            helper.make_node("MatMulIntegerToFloat", inputs, [output], name=node.name, domain=CONTRIB)
        )
        replacements[id(node)] = nodes
    replace_nodes(g, replacements)


def _unsigned(quantize: onnx.NodeProto, output: str) -> onnx.NodeProto:
    inputs = [quantize.input[0], quantize.input[1], ZERO_POINT]
    return helper.make_node("QuantizeLinear", inputs, [output], name=quantize.name + ".u8")


def _absorb_bias(
    g: Graph, product: onnx.NodeProto, consumers: dict[str, list[onnx.NodeProto]], replacements: Replacements
) -> tuple[str, str]:
    """Drop the Add after a product; return its bias and output. Without one: "" and the product's output."""
    readers = consumers.get(product.output[0], [])
    if len(readers) != 1 or readers[0].op_type != "Add" or readers[0].input[1] not in g.weights:
        return "", product.output[0]
    add = readers[0]
    replacements[id(add)] = []
    return add.input[1], add.output[0]


def weight_only_products(g: Graph, scale_dtype: str = "float32", accuracy: int = 4) -> None:
    """MatMul(x, Dequantize(W)) [+ bias] → MatMulNBits.

    Otherwise ONNX Runtime repacks the weights at every load and holds them in memory twice.

    Args:
        g: Changed in place.
        scale_dtype: The type of x.
        accuracy: The operator's accuracy level; 4 multiplies in INT8, 0 in the type of x.
    """
    producers = g.producers()
    consumers = g.consumers()
    replacements: Replacements = {}
    for node in g.nodes:
        w = producers.get(node.input[1]) if node.op_type == "MatMul" else None
        if w is None or w.op_type != "DequantizeLinear" or w.input[0] not in g.weights:
            continue
        weight = g.weights[w.input[0]]
        scale = g.weights[w.input[1]]
        inputs, outputs = weight.tensor.shape
        bits = 4 if weight.dtype == "int4" else 8
        block = next((a.i for a in w.attribute if a.name == "block_size"), 0) or _largest_block(inputs)
        if not block:
            continue
        packed = w.input[0] + ".nbits"
        scales = w.input[1] + ".nbits"
        g.weights[packed] = Weight(_nbits(weight.tensor, packed, bits, block), "uint8")
        g.weights[scales] = Weight(_nbits_scales(scale.tensor, scales, inputs // block, outputs), scale_dtype)
        bias, output = _absorb_bias(g, node, consumers, replacements)
        product = helper.make_node(
            "MatMulNBits",
            [node.input[0], packed, scales, *(["", "", bias] if bias else [])],
            [output],
            name=node.name,
            domain=CONTRIB,
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=block,
            accuracy_level=accuracy,
        )
        replacements[id(node)] = [product]
    replace_nodes(g, replacements)


def _largest_block(inputs: int) -> int:
    """The largest block that divides a column with one scale; 0 if none does."""
    return next((block for block in BLOCKS if inputs % block == 0), 0)


def _nbits(tensor: Tensor, name: str, bits: int, block: int) -> Tensor:
    """(K, N) signed → MatMulNBits' (N, K / block, bytes of a block), unsigned with zero point 8 or 128."""
    inputs, outputs = tensor.shape
    shape = (outputs, inputs // block, block * bits // 8)

    def load() -> np.ndarray:
        stored = np.asarray(tensor.load())
        if bits == 8:
            return (stored.view(np.uint8) ^ 128).T.reshape(shape)
        rows = stored.reshape(inputs, outputs // 2) ^ 0x88  # two columns in a byte, now from 0 to 15
        low, high = rows[0::2], rows[1::2]
        columns = np.empty((outputs, inputs // 2), np.uint8)
        columns[0::2] = ((low & 15) | (high << 4)).T
        columns[1::2] = ((low >> 4) | (high & 0xF0)).T
        return columns.reshape(shape)

    return Tensor(name, shape, load)


def _nbits_scales(tensor: Tensor, name: str, blocks: int, outputs: int) -> Tensor:
    """Scales (K / block, N), or (N,) for all blocks → (N, K / block)."""

    def load() -> np.ndarray:
        scales = np.asarray(tensor.load(), np.float32)
        return np.repeat(scales[:, None], blocks, axis=1) if scales.ndim == 1 else scales.T

    return Tensor(name, (outputs, blocks), load)
