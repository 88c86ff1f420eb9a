"""Functions with golden data of their own: prompts, position stretch, pooling, projectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from helpers.commands import GOLDEN
from ppllava_edge.engines.bundle.prompt_template import MVBENCH_SYSTEM, TEMPLATES, PromptTemplate
from ppllava_edge.engines.bundle.windows import Windows
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs.graph import DOMAIN, Graph
from ppllava_edge.engines.graphs.tensors import Tensor
from ppllava_edge.export.stages.pool_function import POOL, pool_function
from ppllava_edge.export.stages.question import stretch_positions

PROMPTS = json.loads((GOLDEN / "text" / "prompts.json").read_text())
POOLING = json.loads((GOLDEN / "functions" / "pooling.json").read_text())
POOLING_ARRAYS = np.load(GOLDEN / "functions" / "pooling.npz")


# -- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PROMPTS, ids=lambda c: f"{c['template']}-{c['kind']}")
def test_prompts(case: dict[str, Any]) -> None:
    template, kind = TEMPLATES[case["template"]], case["kind"]
    if kind == "qabench_flow":
        assert template.question_prompt(case["q1"]) == case["prompt"]
    elif kind == "mvbench_flow":
        query = (
            (MVBENCH_SYSTEM if case["system_llm"] else "") + case["question"] + "\nOnly give the best option."
        )
        assert template.render([(template.query(query), "Best option:(")]) == case["prompt"]
    elif kind == "videomme_flow":
        subtitles = (
            f"This video's subtitles are listed below: {case['subtitles']} \n" if case["subtitles"] else ""
        )
        task = (
            "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
            "Respond with only the letter (A, B, C, or D) of the correct option.\n"
        )
        assert (
            template.render([(template.query(subtitles + task + case["question"]), "The best answer is:")])
            == case["prompt"]
        )
    else:
        turns: list[tuple[str, str | None]] = [
            (template.query(case["q1"], images=3 if kind == "three_image_tokens" else 1), case.get("a1"))
        ]
        if "q2" in case:
            turns.append((case["q2"], case.get("a2")))
        assert template.render(turns, final_separator=kind == "two_turn_training_full") == case["prompt"]


def test_templates_survive_the_manifest() -> None:
    for template in TEMPLATES.values():
        assert PromptTemplate.from_json(json.loads(json.dumps(template.as_json()))) == template


# -- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_position_stretch(family: str) -> None:
    arrays = np.load(GOLDEN / "functions" / "position_stretch.npz")
    np.testing.assert_allclose(stretch_positions(arrays[f"{family}_in"]), arrays[f"{family}_out"], atol=1e-6)


# -- pooling ---------------------------------------------------------------------------------------------------------


def pool(
    hidden: np.ndarray,
    weights: np.ndarray,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    temperature: float,
) -> np.ndarray:
    """The exported function alone, on ONNX Runtime. hidden (T,H,W,D), weights (T,H,W) → (N,D)."""
    value, names = helper.make_tensor_value_info, ["hidden", "weights", "kernel", "stride"]
    inputs = [
        value(names[0], 1, ["t", "h", "w", "d"]),
        value(names[1], 1, ["t", "h", "w"]),
        value(names[2], 7, [3]),
        value(names[3], 7, [3]),
    ]
    node = helper.make_node(POOL, names, ["tokens"], domain=DOMAIN, temperature=float(temperature))
    graph = helper.make_graph([node], "pool", inputs, [value("tokens", TensorProto.FLOAT, ["n", "d"])])
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[pool_function()], ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        "hidden": hidden,
        "weights": weights,
        "kernel": np.array(kernel, np.int64),
        "stride": np.array(stride, np.int64),
    }
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("case", POOLING, ids=lambda c: str(c["case"]))
def test_pooling_cases(case: dict[str, Any]) -> None:
    triples = (tuple(case[name]) if case[name] else None for name in ("kernel", "stride", "output_size"))
    windows, size = Windows(*triples), (case["D"], case["H"], case["W"])
    if case["case"] == 26:  # upstream divides by zero; one window is one window
        assert windows.resolve(size)[0] == (1, 2, 2)
        return
    if "error" in case or case["case"] == 23:  # 23: upstream returns scrambled values
        with pytest.raises(PPLLaVAError):
            windows.resolve(size)
        return
    output, kernel, stride = windows.resolve(size)
    assert [list(output), list(kernel), list(stride)] == [
        case["resolved_output"],
        case["resolved_kernel"],
        case["resolved_stride"],
    ]
    i = case["case"]
    inputs = POOLING_ARRAYS[f"input_{i}"]
    weights = (
        POOLING_ARRAYS[f"weights_{i}"]
        if f"weights_{i}" in POOLING_ARRAYS
        else np.ones(inputs[:, 0].shape, np.float32)
    )
    for n in range(len(inputs)):
        got = pool(
            np.ascontiguousarray(inputs[n].transpose(1, 2, 3, 0)),
            weights[n],
            kernel,
            stride,
            case["temperature"],
        )
        want = POOLING_ARRAYS[f"output_{i}"][n].reshape(inputs.shape[1], -1).T
        np.testing.assert_allclose(got, want, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_pooling_against_float64(data: st.DataObject) -> None:
    """Any kernel and stride, overlapping too, against the definition in float64."""
    size = tuple(data.draw(st.integers(1, 7)) for _ in range(3))
    kernel = tuple(data.draw(st.integers(1, n)) for n in size)
    stride = tuple(data.draw(st.integers(1, 4)) for _ in size)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    hidden, weights = rng.standard_normal((*size, 5)).astype(np.float32), rng.random(size).astype(np.float32)
    output = [(n - k) // s + 1 for n, k, s in zip(size, kernel, stride)]
    want = []
    for index in np.ndindex(*output):
        window = tuple(slice(i * s, i * s + k) for i, s, k in zip(index, stride, kernel))
        share = np.exp((weights[window].astype(np.float64) - weights[window].max()) / 0.1)
        want.append((hidden[window] * (share / share.sum())[..., None]).sum((0, 1, 2)))
    np.testing.assert_allclose(pool(hidden, weights, kernel, stride, 0.1), np.array(want), atol=1e-5)


@given(st.integers(1, 64), st.integers(1, 30), st.data())
def test_resolved_windows_cover_what_they_say(frames_: int, side: int, data: st.DataObject) -> None:
    parts = [data.draw(st.none() | st.tuples(*[st.integers(1, 12)] * 3)) for _ in range(3)]
    try:
        output, kernel, stride = Windows(*parts).resolve((frames_, side, side))
    except PPLLaVAError:
        return
    for n, o, k, s in zip((frames_, side, side), output, kernel, stride):
        assert (o - 1) * s + k <= n and (n - k) // s + 1 == o


# -- projectors ------------------------------------------------------------------------------------------------------


def _projector(
    folder: Path, model: Any, features: np.ndarray, tmp_path: Path, **feeds: np.ndarray
) -> np.ndarray:
    from safetensors.numpy import load_file

    from ppllava_edge.export.stages.pooling import build_pooling

    tensors = load_file(folder / "model.safetensors")
    g = Graph("pooling")
    build_pooling(
        g, lambda name, *shape: Tensor.of(name, tensors["multi_modal_projector." + name]), model, "float32"
    )
    g.save(tmp_path / "pooling.onnx")
    return ort.InferenceSession(str(tmp_path / "pooling.onnx"), providers=["CPUExecutionProvider"]).run(
        None, {"features": features, **feeds}
    )[0]


_UNGUIDED = [
    (mode, case)
    for mode in ("pllava", "pllava_npu")
    for case in json.loads((GOLDEN / "pllava_tiny" / f"projector_direct_{mode}.json").read_text())
]


@pytest.mark.parametrize(("mode", "case"), _UNGUIDED, ids=str)
def test_unguided_projectors(mode: str, case: dict[str, Any], tmp_path: Path) -> None:
    """Adaptive average pooling, and its variant of fixed windows, with other output sizes."""
    from ppllava_edge.export.config.model import Overrides
    from ppllava_edge.export.config.reader import read_model

    folder, i, frames_ = GOLDEN / "pllava_tiny", case["case"], case["num_frames"]
    arrays = np.load(folder / f"projector_direct_{mode}.npz")
    overrides = Overrides(pooling=mode, output_size=tuple(case["pooling_shape"]))
    config = json.loads((folder / "config.json").read_text())
    if f"x_{i}" not in arrays:  # more outputs than inputs: the original fails on these windows, and so do we
        with pytest.raises(PPLLaVAError):
            read_model(config, None, overrides).video_windows.resolve((frames_, 6, 6))
        return
    model, x, feeds = read_model(config, None, overrides), arrays[f"x_{i}"], {}
    if mode == "pllava_npu":
        _, kernel, stride = model.video_windows.resolve((len(x), *model.vision.grid))
        feeds = {
            "weights": np.zeros((len(x), *model.vision.grid), np.float32),
            "kernel": np.array(kernel),
            "stride": np.array(stride),
        }
    np.testing.assert_allclose(
        _projector(folder, model, x, tmp_path, **feeds), arrays[f"out_{i}"][0], atol=2e-4
    )


@pytest.mark.parametrize("variant", ["vicuna_tiny", "qwen_tiny"])
@pytest.mark.parametrize("case", range(5))
def test_guided_projectors(variant: str, case: int, tmp_path: Path) -> None:
    """The whole projector, question tower included, on random features with other grids, kernels, output sizes and temperatures."""
    from safetensors.numpy import load_file

    from ppllava_edge.export.config.model import Overrides
    from ppllava_edge.export.config.reader import read_model
    from ppllava_edge.export.stages.question import build_question
    from ppllava_edge.export.stages.similarity import build_similarity

    folder = GOLDEN / variant
    told, arrays = (
        json.loads((folder / "projector_direct.json").read_text())[case],
        np.load(folder / "projector_direct.npz"),
    )
    config = json.loads((folder / "config.json").read_text()) | {
        "frame_shape": told["frame_shape"],
        "pooling_temp": told["temperature"],
    }
    config |= {
        "pooling_kernel": told["kernel"],
        "pooling_stride": told["stride"],
        "pllava_pooling_shape": told["output_size"],
    }
    config |= {"image_pooling_kernel": None, "image_pooling_stride": None, "valuew_plus": False}
    model = read_model(
        config, json.loads((folder / config["clip_weight"] / "config.json").read_text()), Overrides()
    )
    x, tensors = arrays[f"x_{case}"], load_file(folder / "model.safetensors")
    size = 32 if model.siglip else 20
    shapes = {name: a.shape for name, a in tensors.items()}
    question, similarity = Graph("question"), Graph("similarity")
    assert model.question is not None
    build_question(
        question,
        lambda name, *shape: Tensor.of(name, tensors[name]),
        shapes,
        model.question,
        model.siglip,
        size,
    )
    projector = lambda name, *shape: Tensor.of(name, tensors["multi_modal_projector." + name].reshape(shape))  # noqa: E731
    build_similarity(similarity, projector, model, "float32", size)
    question.save(tmp_path / "q.onnx")
    similarity.save(tmp_path / "s.onnx")
    open_ = lambda name: ort.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])  # noqa: E731
    ids = arrays[f"ids_{case}"].astype(np.int64)
    mask = arrays[f"mask_{case}"].astype(np.int64) if f"mask_{case}" in arrays else np.ones_like(ids)
    q = open_("q.onnx").run(None, {"ids": ids, "mask": mask})[0]
    cosine, weights = open_("s.onnx").run(None, {"features": x, "q": q})
    np.testing.assert_allclose(cosine, arrays[f"similarity_{case}"][0], atol=2e-5)
    _, kernel, stride = model.video_windows.resolve((len(x), *model.vision.grid))
    got = _projector(
        folder, model, x, tmp_path, weights=weights, kernel=np.array(kernel), stride=np.array(stride)
    )
    np.testing.assert_allclose(got, arrays[f"out_{case}"][0], atol=1e-3)
