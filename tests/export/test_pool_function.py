"""PromptGuidedPool3d, the exported pooling function, against upstream's arrays and its definition."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from helpers.commands import GOLDEN
from ppllava_edge.engines.bundle.windows import Windows
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs.graph import DOMAIN
from ppllava_edge.export.stages.pool_function import INPUTS, POOL, pool_function

CASES = json.loads((GOLDEN / "functions" / "pooling.json").read_text())
ARRAYS = np.load(GOLDEN / "functions" / "pooling.npz")
DIVIDES_BY_ZERO = 26  # upstream divides by zero; here it is one window
SCRAMBLED = 23  # upstream returns values in a wrong order


def pool(
    hidden: np.ndarray,
    weights: np.ndarray,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    temperature: float,
) -> np.ndarray:
    """Run the function alone on ONNX Runtime: hidden (T, H, W, D), weights (T, H, W) → (N, D)."""
    inputs = [
        helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["t", "h", "w", "d"]),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["t", "h", "w"]),
        helper.make_tensor_value_info("kernel", TensorProto.INT64, [3]),
        helper.make_tensor_value_info("stride", TensorProto.INT64, [3]),
    ]
    output = helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["n", "d"])
    node = helper.make_node(POOL, list(INPUTS), ["tokens"], domain=DOMAIN, temperature=float(temperature))
    graph = helper.make_graph([node], "pool", inputs, [output])
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[pool_function()], ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"hidden": hidden, "weights": weights, "kernel": np.array(kernel), "stride": np.array(stride)}
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c["case"]))
def test_pooling_cases(case: dict[str, Any]) -> None:
    triples = (tuple(case[name]) if case[name] else None for name in ("kernel", "stride", "output_size"))
    windows = Windows(*triples)
    size = (case["D"], case["H"], case["W"])
    i = case["case"]
    if i == DIVIDES_BY_ZERO:
        assert windows.resolve(size)[0] == (1, 2, 2)
        return
    if "error" in case or i == SCRAMBLED:
        with pytest.raises(PPLLaVAError):
            windows.resolve(size)
        return
    output, kernel, stride = windows.resolve(size)
    assert list(output) == case["resolved_output"]
    assert list(kernel) == case["resolved_kernel"]
    assert list(stride) == case["resolved_stride"]
    inputs = ARRAYS[f"input_{i}"]
    uniform = np.ones(inputs[:, 0].shape, np.float32)
    weights = ARRAYS.get(f"weights_{i}", uniform)
    for n in range(len(inputs)):
        hidden = np.ascontiguousarray(inputs[n].transpose(1, 2, 3, 0))
        got = pool(hidden, weights[n], kernel, stride, case["temperature"])
        want = ARRAYS[f"output_{i}"][n].reshape(inputs.shape[1], -1).T
        np.testing.assert_allclose(got, want, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_pooling_against_float64(data: st.DataObject) -> None:
    """Any kernel and stride, overlapping too, against the definition in float64."""
    size = tuple(data.draw(st.integers(1, 7)) for _ in range(3))
    kernel = tuple(data.draw(st.integers(1, n)) for n in size)
    stride = tuple(data.draw(st.integers(1, 4)) for _ in size)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    hidden = rng.standard_normal((*size, 5)).astype(np.float32)
    weights = rng.random(size).astype(np.float32)
    output = [(n - k) // s + 1 for n, k, s in zip(size, kernel, stride)]
    want = []
    for index in np.ndindex(*output):
        window = tuple(slice(i * s, i * s + k) for i, s, k in zip(index, stride, kernel))
        share = np.exp((weights[window].astype(np.float64) - weights[window].max()) / 0.1)
        want.append((hidden[window] * (share / share.sum())[..., None]).sum((0, 1, 2)))
    np.testing.assert_allclose(pool(hidden, weights, kernel, stride, 0.1), np.array(want), atol=1e-5)
