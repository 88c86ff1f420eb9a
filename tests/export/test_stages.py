"""Parts of the exported network against upstream's arrays: position tables, projectors, rotary tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

from helpers.commands import GOLDEN
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import Tensor
from ppllava_edge.export.config.model import Model, Overrides
from ppllava_edge.export.config.reader import read_model
from ppllava_edge.export.stages.decoder import rotary_tables
from ppllava_edge.export.stages.layers import WeightSource
from ppllava_edge.export.stages.pooling import build_pooling
from ppllava_edge.export.stages.question import build_question, stretch_positions
from ppllava_edge.export.stages.similarity import PROJECTOR, build_similarity

EMBEDDING_SIZE = {"vicuna_tiny": 20, "qwen_tiny": 32}


def weights_below(tensors: dict[str, np.ndarray], prefix: str = "") -> WeightSource:
    def source(name: str, *shape: int) -> Tensor:
        return Tensor.of(name, tensors[prefix + name].reshape(shape))

    return source


def run_graph(g: Graph, folder: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    path = folder / f"{g.name}.onnx"
    g.save(path)
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)


def run_pooling(
    tensors: dict[str, np.ndarray], model: Model, features: np.ndarray, folder: Path, **feeds: np.ndarray
) -> np.ndarray:
    g = Graph("pooling")
    build_pooling(g, weights_below(tensors, PROJECTOR), model, "float32")
    return run_graph(g, folder, {"features": features, **feeds})[0]


def run_question(
    tensors: dict[str, np.ndarray], model: Model, ids: np.ndarray, mask: np.ndarray, size: int, folder: Path
) -> np.ndarray:
    g = Graph("question")
    shapes = {name: array.shape for name, array in tensors.items()}
    assert model.question is not None
    build_question(g, weights_below(tensors), shapes, model.question, model.siglip, size)
    return run_graph(g, folder, {"ids": ids, "mask": mask})[0]


def run_similarity(
    tensors: dict[str, np.ndarray], model: Model, features: np.ndarray, q: np.ndarray, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    g = Graph("similarity")
    build_similarity(g, weights_below(tensors, PROJECTOR), model, "float32", q.shape[1])
    cosine, weights = run_graph(g, folder, {"features": features, "q": q})
    return cosine, weights


# -- position tables -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_position_stretch(family: str) -> None:
    arrays = np.load(GOLDEN / "functions" / "position_stretch.npz")
    np.testing.assert_allclose(stretch_positions(arrays[f"{family}_in"]), arrays[f"{family}_out"], atol=1e-6)


def test_linear_rotary_scaling_stretches_positions() -> None:
    folder = GOLDEN / "vicuna_tiny_bt"
    config = json.loads((folder / "config.json").read_text())
    question = json.loads((folder / "clip_tiny" / "config.json").read_text())
    plain = rotary_tables(read_model(config, question, Overrides()).decoder)
    config["text_config"]["rope_scaling"] = {"type": "linear", "factor": 4.0}
    scaled = rotary_tables(read_model(config, question, Overrides()).decoder)
    for a, b in zip(plain, scaled):
        np.testing.assert_allclose(b.load()[::4], a.load()[:256], atol=1e-6)


# -- projectors ------------------------------------------------------------------------------------

UNGUIDED = [
    (mode, case)
    for mode in ("pllava", "pllava_npu")
    for case in json.loads((GOLDEN / "pllava_tiny" / f"projector_direct_{mode}.json").read_text())
]


@pytest.mark.parametrize(("mode", "case"), UNGUIDED, ids=str)
def test_unguided_projectors(mode: str, case: dict[str, Any], tmp_path: Path) -> None:
    """Adaptive average pooling, and its variant of fixed windows, with other output sizes."""
    folder, i = GOLDEN / "pllava_tiny", case["case"]
    arrays = np.load(folder / f"projector_direct_{mode}.npz")
    overrides = Overrides(pooling=mode, output_size=tuple(case["pooling_shape"]))
    config = json.loads((folder / "config.json").read_text())
    if (
        f"x_{i}" not in arrays
    ):  # more outputs than inputs: upstream fails on these windows, and so does the export
        with pytest.raises(PPLLaVAError):
            read_model(config, None, overrides).video_windows.resolve((case["num_frames"], 6, 6))
        return
    model = read_model(config, None, overrides)
    x, feeds = arrays[f"x_{i}"], {}
    if mode == "pllava_npu":
        size = (len(x), *model.vision.grid)
        _, kernel, stride = model.video_windows.resolve(size)
        weights = np.zeros(size, np.float32)
        feeds = {"weights": weights, "kernel": np.array(kernel), "stride": np.array(stride)}
    tensors = load_file(folder / "model.safetensors")
    got = run_pooling(tensors, model, x, tmp_path, **feeds)
    np.testing.assert_allclose(got, arrays[f"out_{i}"][0], atol=2e-4)


def guided_model(folder: Path, case: dict[str, Any]) -> Model:
    """A golden checkpoint's configuration with the grid, windows and temperature of a case."""
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "frame_shape": case["frame_shape"],
        "pooling_temp": case["temperature"],
        "pooling_kernel": case["kernel"],
        "pooling_stride": case["stride"],
        "pllava_pooling_shape": case["output_size"],
        "image_pooling_kernel": None,
        "image_pooling_stride": None,
        "valuew_plus": False,
    }
    question_config = json.loads((folder / config["clip_weight"] / "config.json").read_text())
    return read_model(config, question_config, Overrides())


@pytest.mark.parametrize("variant", ["vicuna_tiny", "qwen_tiny"])
@pytest.mark.parametrize("case", range(5))
def test_guided_projectors(variant: str, case: int, tmp_path: Path) -> None:
    """The whole projector with its question tower, on random features.

    Grids, kernels, output sizes and temperatures are not those of the checkpoint.
    """
    folder = GOLDEN / variant
    arrays = np.load(folder / "projector_direct.npz")
    tensors = load_file(folder / "model.safetensors")
    model = guided_model(folder, json.loads((folder / "projector_direct.json").read_text())[case])
    x, ids = arrays[f"x_{case}"], arrays[f"ids_{case}"].astype(np.int64)
    mask = arrays[f"mask_{case}"].astype(np.int64) if f"mask_{case}" in arrays else np.ones_like(ids)
    q = run_question(tensors, model, ids, mask, EMBEDDING_SIZE[variant], tmp_path)
    cosine, weights = run_similarity(tensors, model, x, q, tmp_path)
    np.testing.assert_allclose(cosine, arrays[f"similarity_{case}"][0], atol=2e-5)
    _, kernel, stride = model.video_windows.resolve((len(x), *model.vision.grid))
    windows = {"kernel": np.array(kernel), "stride": np.array(stride)}
    got = run_pooling(tensors, model, x, tmp_path, weights=weights, **windows)
    np.testing.assert_allclose(got, arrays[f"out_{case}"][0], atol=1e-3)
