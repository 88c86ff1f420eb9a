"""pooling.onnx: projector and pooling, from features to visual tokens.

Guided: features (t, P, C), weights (t, rows, columns), kernel int64[3], stride int64[3] → visual tokens (n,
D). Unguided (pllava, avp, none): features alone.

The pooling comes between the projector's two linear layers. The weights of a window sum to 1 and the second
layer is affine, so the order does not change the result, and the second layer sees one row per window instead
of one per patch.
"""

from __future__ import annotations

from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs.graph import DOMAIN, Graph
from ppllava_edge.engines.graphs.tensors import ONNX_TYPE
from ppllava_edge.export.config.model import Model
from ppllava_edge.export.stages.layers import WeightSource, linear
from ppllava_edge.export.stages.pool_function import POOL, pool_function


def build_pooling(g: Graph, source: WeightSource, model: Model, features_dtype: str) -> None:
    """Write the pooling's graph.

    Args:
        g: The graph to write.
        source: Weights by their names relative to similarity.PROJECTOR.
        model: The model's configuration.
        features_dtype: The type of the features that the vision stages output.
    """
    v, width = model.vision, model.decoder.width
    features = g.input("features", features_dtype, ["t", v.patches, v.width])
    x = features if features_dtype == g.dtype else g.Cast(features, to=ONNX_TYPE[g.dtype])
    hidden = g.Gelu(linear(g, source, x, "linear_1", v.width, width))
    if model.pooling in ("ppllava", "pllava_npu"):
        pooled = guided_pooling(g, model, hidden)
    elif model.pooling == "pllava":
        assert model.pooled_shape is not None
        pooled = adaptive_average_pooling(g, hidden, v.grid, model.pooled_shape, width)
    elif model.pooling == "avp":
        pooled = g.ReduceMean(hidden, g.ints(0), keepdims=0)
    elif model.pooling == "none":
        pooled = g.Reshape(hidden, g.ints(-1, width))
    else:
        raise PPLLaVAError(f"there is no graph for the pooling {model.pooling!r}")
    g.output(linear(g, source, pooled, "linear_2", width, width), "visual_tokens", g.dtype, ["n", width])


def guided_pooling(g: Graph, model: Model, hidden: str) -> str:
    """Add prompt-guided pooling, hidden (t, P, D) → (n, D), with inputs for weights, kernel and stride."""
    rows, columns = model.vision.grid
    weights = g.input("weights", "float32", ["t", rows, columns])
    kernel = g.input("kernel", "int64", [3])
    stride = g.input("stride", "int64", [3])
    g.add_function(pool_function())
    grid = g.Reshape(hidden, g.ints(-1, rows, columns, model.decoder.width))
    return g.op(POOL, grid, weights, kernel, stride, domain=DOMAIN, temperature=float(model.temperature))


def adaptive_average_pooling(
    g: Graph, hidden: str, grid: tuple[int, int], shape: tuple[int, int, int], width: int
) -> str:
    """Add adaptive average pooling in three dimensions, hidden (t, P, D) → (n, D).

    Window i of n over a length L spans floor(i * L / n) … ceil((i + 1) * L / n). A box average is the product
    of one average per axis, so three small matrix products compute it.

    Args:
        grid: Rows and columns of the patches.
        shape: Windows along frames, rows and columns.
        width: D.
    """
    frames = g.Squeeze(g.Shape(hidden, start=0, end=1))
    lengths = (frames, g.integer(grid[0]), g.integer(grid[1]))
    over_time, over_rows, over_columns = (
        _averaging_matrix(g, length, count) for length, count in zip(lengths, shape)
    )
    x = g.MatMul(over_time, g.Reshape(hidden, g.ints(0, -1)))  # (n_t, rows * columns * D)
    x = g.Reshape(x, g.ints(shape[0], grid[0], grid[1] * width))
    x = g.Reshape(g.MatMul(over_rows, x), g.ints(shape[0] * shape[1], grid[1], width))
    return g.Reshape(g.MatMul(over_columns, x), g.ints(-1, width))


def _averaging_matrix(g: Graph, length: str, count: int) -> str:
    """A (count, length) matrix whose row i averages the span of window i."""
    index = g.Unsqueeze(g.Range(g.integer(0), g.integer(count), g.integer(1)), g.ints(1))
    start = g.Div(g.Mul(index, length), g.integer(count))
    end = g.Mul(g.Add(index, g.integer(1)), length)
    end = g.Div(g.Add(end, g.integer(count - 1)), g.integer(count))
    position = g.Unsqueeze(g.Range(g.integer(0), length, g.integer(1)), g.ints(0))
    inside = g.And(g.GreaterOrEqual(position, start), g.Less(position, end))
    inside = g.Cast(inside, to=ONNX_TYPE[g.dtype])
    return g.Div(inside, g.ReduceSum(inside, g.ints(1), keepdims=1))
