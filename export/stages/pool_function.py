"""PromptGuidedPool3d, the ONNX function of prompt-guided pooling (paper: weighted convolutional pooling)."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from ppllava_edge.engines.graphs.graph import DOMAIN, OPSET

POOL = "PromptGuidedPool3d"
INPUTS = ("hidden", "weights", "kernel", "stride")
ATTRIBUTES = ("temperature", "plugin_namespace", "plugin_version")


def pool_function() -> onnx.FunctionProto:
    """Build the function.

    Inputs: hidden (T, H, W, D), weights (T, H, W) float32, kernel int64[3], stride int64[3].
    Output: tokens (N, D).

    For every window: softmax(weights / temperature), then the weighted sum of the hidden rows. Windows may
    overlap; positions beyond the last whole window are dropped. plugin_namespace and plugin_version are
    declared for builders that turn the node into a TensorRT plugin; the body doesn't use them.
    """
    f = _Body()
    temperature = f.attribute("temperature", "temperature_value")
    size = f.op("Shape", "weights")
    index = _window_index(f, size)  # (N, window) into T * H * W
    window_weights = f.op("Gather", f.op("Reshape", "weights", f.ints(-1)), index, axis=0)
    share = f.op("Softmax", f.op("Div", window_weights, temperature), axis=-1)
    depth = f.op("Shape", "hidden", start=3, end=4)
    flat = f.op("Reshape", "hidden", f.op("Concat", f.ints(-1), depth, axis=0))
    window_rows = f.op("Gather", flat, index, axis=0)  # (N, window, D)
    share = f.op("Unsqueeze", f.op("CastLike", share, "hidden"), f.ints(1))
    pooled = f.op("MatMul", share, window_rows)
    f.op("Squeeze", pooled, f.ints(1), output="tokens")
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, POOL, list(INPUTS), ["tokens"], f.nodes, opsets, list(ATTRIBUTES))


class _Body:
    """The nodes of a function, written one after the other."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def ints(self, *values: int) -> str:
        return self.op("Constant", value_ints=list(values))

    def integer(self, value: int) -> str:
        return self.op("Constant", value_int=value)

    def attribute(self, attribute: str, name: str) -> str:
        """The value of one of the function's float attributes."""
        constant = helper.make_node("Constant", [], [name])
        reference = onnx.AttributeProto(
            name="value_float", ref_attr_name=attribute, type=onnx.AttributeProto.FLOAT
        )
        constant.attribute.append(reference)
        self.nodes.append(constant)
        return name


def _window_index(f: _Body, size: str) -> str:
    """The flat positions of every window's elements, (N, window). size: T, H, W."""
    spans = f.op("Div", f.op("Sub", size, "kernel"), "stride")
    counts = f.op("Add", spans, f.ints(1))  # windows along each axis
    zero, one = f.integer(0), f.integer(1)
    frames, rows, columns = (_axis_positions(f, axis, counts, zero, one) for axis in range(3))
    height, width = (f.op("Gather", size, f.integer(axis), axis=0) for axis in (1, 2))
    index = f.op("Add", f.op("Mul", frames, height), rows)
    index = f.op("Add", f.op("Mul", index, width), columns)
    per_window = f.op("ReduceProd", "kernel", keepdims=1)
    return f.op("Reshape", index, f.op("Concat", f.ints(-1), per_window, axis=0))


def _axis_positions(f: _Body, axis: int, counts: str, zero: str, one: str) -> str:
    """Positions (windows, kernel) along one axis, as a tensor that broadcasts to (ot, oh, ow, kt, kh, kw)."""
    which = f.integer(axis)
    window = f.op("Range", zero, f.op("Gather", counts, which, axis=0), one)
    start = f.op("Mul", window, f.op("Gather", "stride", which, axis=0))
    inside = f.op("Range", zero, f.op("Gather", "kernel", which, axis=0), one)
    start = f.op("Unsqueeze", start, f.ints(1))
    grid = f.op("Add", start, f.op("Unsqueeze", inside, f.ints(0)))
    others = [other for other in range(3) if other != axis]
    return f.op("Unsqueeze", grid, f.ints(*others, *(other + 3 for other in others)))
