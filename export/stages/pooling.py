"""pooling.onnx: projector and pooling, from features to visual tokens.

Guided: features (t, P, C), weights (t, rows, columns), kernel int64[3], stride int64[3] → visual tokens (n, D). The pooling stands
between the projector's two linears: window weights sum to 1 and the second linear is affine, so the order doesn't matter, and the second
linear sees as many rows as there are windows instead of as many as there are patches.

The poolings without guidance (pllava, avp, none) take features alone.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from ppllava_edge.engines.graphs.graph import DOMAIN, OPSET, Graph
from ppllava_edge.export.config import Model
from ppllava_edge.export.stages.layers import Source, linear

POOL = "PromptGuidedPool3d"


def build_pooling(g: Graph, source: Source, model: Model, features_dtype: str) -> None:
    """Write the graph. Source names are below similarity.PROJECTOR."""
    v, width = model.vision, model.decoder.width
    features = g.input("features", features_dtype, ["t", v.patches, v.width])
    x = features if features_dtype == g.dtype else g.Cast(features, to=_onnx_float(g.dtype))
    hidden = g.Gelu(linear(g, source, x, "linear_1", v.width, width))
    if model.pooling in ("ppllava", "pllava_npu"):
        pooled = _guided(g, model, hidden)
    elif model.pooling == "pllava":
        assert model.pooled_shape is not None
        pooled = _adaptive_average(g, hidden, v.grid, model.pooled_shape, width)
    elif model.pooling == "avp":
        pooled = g.ReduceMean(hidden, g.ints(0), keepdims=0)
    else:
        pooled = g.Reshape(hidden, g.ints(-1, width))
    g.output(linear(g, source, pooled, "linear_2", width, width), "visual_tokens", g.dtype, ["n", width])


def _guided(g: Graph, model: Model, hidden: str) -> str:
    rows, columns = model.vision.grid
    weights = g.input("weights", "float32", ["t", rows, columns])
    kernel, stride = g.input("kernel", "int64", [3]), g.input("stride", "int64", [3])
    g.add_function(pool_function())
    grid = g.Reshape(hidden, g.ints(-1, rows, columns, model.decoder.width))
    return g.op(POOL, grid, weights, kernel, stride, domain=DOMAIN, temperature=float(model.temperature))


def _adaptive_average(
    g: Graph, hidden: str, grid: tuple[int, int], shape: tuple[int, int, int], width: int
) -> str:
    """Adaptive average pooling in three dimensions: window i of n over a length L spans floor(i*L/n) … ceil((i+1)*L/n).

    A box average is the product of one average per axis, so three small matrices do it.
    """
    frames = g.Squeeze(g.Shape(hidden, start=0, end=1))
    over_time, over_rows, over_columns = (
        _averages(g, length, n) for length, n in zip((frames, g.integer(grid[0]), g.integer(grid[1])), shape)
    )
    x = g.MatMul(over_time, g.Reshape(hidden, g.ints(0, -1)))  # (n_t, rows*columns*D)
    x = g.Reshape(x, g.ints(shape[0], grid[0], grid[1] * width))
    x = g.Reshape(g.MatMul(over_rows, x), g.ints(shape[0] * shape[1], grid[1], width))
    return g.Reshape(g.MatMul(over_columns, x), g.ints(-1, width))


def _averages(g: Graph, length: str, n: int) -> str:
    """(n, length): row i averages what window i spans."""
    index = g.Unsqueeze(g.Range(g.integer(0), g.integer(n), g.integer(1)), g.ints(1))
    low = g.Div(g.Mul(index, length), g.integer(n))
    high = g.Div(g.Add(g.Mul(g.Add(index, g.integer(1)), length), g.integer(n - 1)), g.integer(n))
    at = g.Unsqueeze(g.Range(g.integer(0), length, g.integer(1)), g.ints(0))
    inside = g.Cast(g.And(g.GreaterOrEqual(at, low), g.Less(at, high)), to=_onnx_float(g.dtype))
    return g.Div(inside, g.ReduceSum(inside, g.ints(1), keepdims=1))


def _onnx_float(dtype: str) -> int:
    return onnx.TensorProto.FLOAT if dtype == "float32" else onnx.TensorProto.FLOAT16


def pool_function() -> onnx.FunctionProto:
    """PromptGuidedPool3d(hidden (T,H,W,D), weights (T,H,W) float32, kernel int64[3], stride int64[3]) → (N,D).

    In every window: softmax(weights / temperature), then the weighted sum of the hidden rows (paper: weighted convolutional pooling).
    Overlapping windows too; positions that fill no window are dropped. plugin_namespace and plugin_version are declared for builders that
    turn the node into a TensorRT plugin; the body doesn't use them.
    """
    nodes: list[onnx.NodeProto] = []

    def op(kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{kind.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def ints(*values: int) -> str:
        return op("Constant", value_ints=list(values))

    temperature = helper.make_node("Constant", [], ["temperature_value"])
    reference = onnx.AttributeProto(
        name="value_float", ref_attr_name="temperature", type=onnx.AttributeProto.FLOAT
    )
    temperature.attribute.append(reference)
    nodes.append(temperature)

    size = op("Shape", "weights")
    counts = op("Add", op("Div", op("Sub", size, "kernel"), "stride"), ints(1))  # windows along each axis
    zero, one = op("Constant", value_int=0), op("Constant", value_int=1)
    positions = []
    for axis in range(
        3
    ):  # positions (windows, kernel) along one axis, spread for broadcasting to (ot,oh,ow,kt,kh,kw)
        which = op("Constant", value_int=axis)
        start = op(
            "Mul",
            op("Range", zero, op("Gather", counts, which, axis=0), one),
            op("Gather", "stride", which, axis=0),
        )
        inside = op("Range", zero, op("Gather", "kernel", which, axis=0), one)
        grid = op("Add", op("Unsqueeze", start, ints(1)), op("Unsqueeze", inside, ints(0)))
        others = [a for a in range(3) if a != axis]
        positions.append(op("Unsqueeze", grid, ints(*others, *(a + 3 for a in others))))
    rows, columns = (op("Gather", size, op("Constant", value_int=axis), axis=0) for axis in (1, 2))
    index = op(
        "Add", op("Mul", op("Add", op("Mul", positions[0], rows), positions[1]), columns), positions[2]
    )
    per_window = op("ReduceProd", "kernel", keepdims=1)
    index = op("Reshape", index, op("Concat", ints(-1), per_window, axis=0))  # (N, window)
    window_weights = op("Gather", op("Reshape", "weights", ints(-1)), index, axis=0)
    share = op("Softmax", op("Div", window_weights, "temperature_value"), axis=-1)
    depth = op("Shape", "hidden", start=3, end=4)
    flat = op("Reshape", "hidden", op("Concat", ints(-1), depth, axis=0))
    window_rows = op("Gather", flat, index, axis=0)  # (N, window, D)
    pooled = op("MatMul", op("Unsqueeze", op("CastLike", share, "hidden"), ints(1)), window_rows)
    op("Squeeze", pooled, ints(1), output="tokens")
    return helper.make_function(
        DOMAIN,
        POOL,
        ["hidden", "weights", "kernel", "stride"],
        ["tokens"],
        nodes,
        [helper.make_opsetid("", OPSET)],
        ["temperature", "plugin_namespace", "plugin_version"],
    )
