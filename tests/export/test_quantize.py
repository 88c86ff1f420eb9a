"""Rounding of weights, and quantised graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.commands import GOLDEN, assert_one_line_error, run_command
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.rewrite import to_float32
from ppllava_edge.engines.graphs.tensors import Tensor
from ppllava_edge.export.quantisation.plan import Plan, find_layers, weight_only_plan
from ppllava_edge.export.quantisation.quantize import quantize
from ppllava_edge.export.quantisation.rounding import MIN_SCALE, round_int4, round_int8, unpack_int4
from ppllava_edge.runtime import Pipeline

MATRICES = st.tuples(
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-6, 0.02, 1.0, 300.0]),
)


def matrix(rows: int, columns: int, seed: int, size: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns), np.float32) * np.float32(size)
    return w * (rng.random((rows, columns)) > 0.1)


@given(MATRICES, st.sampled_from(["float32", "float16"]))
@settings(deadline=None)
def test_int8_is_off_by_half_a_step_at_most(case: tuple[int, int, int, float], dtype: str) -> None:
    blocks, columns, seed, size = case
    w = matrix(blocks * 16, columns, seed, size)
    rounded = round_int8(w, dtype)
    scales = rounded.scales.astype(np.float32)
    assert rounded.values.dtype == np.int8 and rounded.values.shape == w.shape
    assert rounded.scales.dtype == dtype and (scales >= MIN_SCALE).all()
    assert np.abs(rounded.values.astype(int)).max(initial=0) <= 127
    # a float16 scale was rounded itself and may clip the largest value by that
    step = scales * (0.5 if dtype == "float32" else 0.5 + 127 * 2**-11)
    difference = rounded.values * scales - w
    assert (np.abs(difference) <= step * 1.001).all()
    error = np.square(difference, dtype=np.float64).sum()
    np.testing.assert_allclose(rounded.error, error, rtol=1e-3, atol=1e-12)


@given(MATRICES, st.sampled_from([16, 32]))
@settings(deadline=None)
def test_int4_blocks_restore_and_search_never_hurts(case: tuple[int, int, int, float], block: int) -> None:
    blocks, columns, seed, size = case
    w = matrix(blocks * 32, 2 * columns, seed, size)
    w_blocks = w.reshape(-1, block, w.shape[1])
    rounded = round_int4(w, block, "float32")
    q = unpack_int4(rounded.values, w.shape).astype(np.float32)
    assert q.min() >= -8 and q.max() <= 7 and rounded.scales.shape == (len(w) // block, w.shape[1])
    restored = q.reshape(w_blocks.shape) * rounded.scales[:, None]
    error = np.square(restored - w_blocks, dtype=np.float64).sum(axis=1)
    np.testing.assert_allclose(error.sum(), rounded.error, rtol=1e-3, atol=1e-12)
    unclipped = np.maximum(np.abs(w_blocks).max(axis=1) / 7, MIN_SCALE)[:, None]
    restored = np.rint(w_blocks / unclipped).clip(-8, 7) * unclipped
    unclipped_error = np.square(restored - w_blocks, dtype=np.float64).sum(axis=1)
    assert (error <= unclipped_error * 1.001 + 1e-12).all()


def test_important_rows_are_rounded_better() -> None:
    w = matrix(64, 64, 0, 1.0)
    importance = np.where(np.arange(64) % 32 < 4, 100.0, 0.01)

    def error(given_importance: np.ndarray | None) -> float:
        rounded = round_int4(w, 32, "float32", importance=given_importance)
        restored = unpack_int4(rounded.values, w.shape).reshape(2, 32, 64) * rounded.scales[:, None]
        return float((np.square(restored.reshape(64, 64) - w).sum(axis=1) * importance).sum())

    assert error(importance) < error(None)


def test_rows_are_multiplied_before_rounding() -> None:
    w, rows = matrix(64, 32, 1, 1.0), np.linspace(0.5, 2, 64).astype(np.float32)
    for plain, folded in (
        (round_int8(w * rows[:, None], "float32"), round_int8(w, "float32", rows)),
        (round_int4(w * rows[:, None], 32, "float32"), round_int4(w, 32, "float32", rows)),
    ):
        np.testing.assert_array_equal(plain.values, folded.values)
        np.testing.assert_array_equal(plain.scales, folded.scales)


# -- graphs ----------------------------------------------------------------------------------------


def logits_and_features(bundle: Path) -> tuple[np.ndarray, np.ndarray]:
    p = Pipeline.open(bundle)
    rng, v = np.random.default_rng(0), p.manifest.vision
    features = p.encode_frames(rng.standard_normal((4, 3, v.image_size, v.image_size)).astype(np.float32))
    q = p.encode_question(np.array([[1, 5, 9, 2]]))
    embeds = np.concatenate([p.embed_tokens([1, 5]), p.visual_tokens(features, q), p.embed_tokens([7])])
    return p.prefill(embeds), features.astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("precision,limit", [("fp16", 0.9999), ("int8", 0.999), ("int4", 0.95)])
def test_a_quantised_golden_model_stays_close(
    golden_bundle: Path, tmp_path: Path, precision: str, limit: float
) -> None:
    flags = ("--precision", precision, "--no-tokenizer", "--block", "16")
    run = run_command("ppllava-export", GOLDEN / "vicuna_tiny_bt", "-o", tmp_path / "b", *flags)
    assert run.returncode == 0, run.stderr
    assert ("weights alone" in run.stderr) == precision.startswith("int")
    want, got = logits_and_features(golden_bundle), logits_and_features(tmp_path / "b")
    for a, b in zip(want, got):
        assert cosine(a, b) > limit
    stored = Pipeline.open(tmp_path / "b").bundle.total_bytes
    if precision != "fp16":
        assert stored < Pipeline.open(golden_bundle).bundle.total_bytes / 2


def test_a_bundle_is_a_source_too(golden_bundle: Path, tmp_path: Path) -> None:
    """Quantising the fp32 bundle equals quantising the checkpoint, and integers are not quantised again."""
    precision = "decoder=int8,vision=fp32,question=fp32,projector=fp32,embeddings=fp32"
    run = run_command("ppllava-export", golden_bundle, "-o", tmp_path / "a", "--precision", precision)
    assert run.returncode == 0, run.stderr
    want, got = logits_and_features(golden_bundle), logits_and_features(tmp_path / "a")
    np.testing.assert_allclose(want[1], got[1], atol=1e-4)
    assert cosine(want[0], got[0]) > 0.999
    assert_one_line_error(
        run_command("ppllava-export", tmp_path / "a", "-o", tmp_path / "b", "--precision", "fp32"),
        "quantised already",
        "checkpoint",
    )
    assert_one_line_error(
        run_command("ppllava-export", golden_bundle, "-o", tmp_path / "b", "--precision", "fp16"),
        "not narrowed",
    )
    assert_one_line_error(
        run_command("ppllava-export", golden_bundle, "-o", tmp_path / "b", "--kernel", "2,3,3"),
        "is a bundle already",
    )
    assert not (tmp_path / "b").exists()


def test_folding_alone_changes_nothing(golden_bundle: Path, tmp_path: Path) -> None:
    """Norms divided, rows multiplied, columns divided: the same model in exact arithmetic."""
    import onnxruntime as ort

    rng = np.random.default_rng(0)
    for name in ("decoder", "trunk"):
        path = golden_bundle / f"{name}.onnx"
        g = Graph.read(path)
        layers = find_layers(g)
        folds = {
            layer.group: np.exp(rng.uniform(-1, 1, layer.inputs)).astype(np.float32)
            for layer in layers
            if layer.foldable
        }
        assert len(folds) >= 2
        if name == "decoder":
            assert any(group.endswith("up_proj.weight") for group in folds)
        quantize(g, Plan({}, folds))
        g.save(tmp_path / f"{name}.onnx")
        results, feeds = [], None
        for file in (path, tmp_path / f"{name}.onnx"):
            session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            feeds = feeds or {i.name: sample_input(i, rng) for i in session.get_inputs()}
            results.append(session.run(None, feeds)[0])
        np.testing.assert_allclose(results[1], results[0], rtol=2e-4, atol=2e-4)


def sample_input(value: Any, rng: np.random.Generator) -> np.ndarray:
    """Values for a graph's input, with sizes for its symbolic dimensions."""
    sizes = {"s": 5, "capacity": 8, "b": 2, "T": 2}
    shape = [sizes.get(d, d) if isinstance(d, str) else d for d in value.shape]
    if value.name == "position_ids":
        return np.arange(np.prod(shape)).reshape(shape)
    if "int64" in value.type:
        return np.zeros(shape, np.int64)
    if value.name == "mask":
        visible = np.arange(shape[-1]) <= np.arange(shape[-2])[:, None]
        return np.where(visible, 0, -np.inf).astype(np.float32)[None, None]
    return rng.standard_normal(shape).astype(np.float32)


def kinds_of_layers(path: Path) -> set[str]:
    return {layer.weight.rsplit(".", 2)[-2] for layer in find_layers(Graph.read(path))}


def test_every_kind_of_layer_is_found(golden_bundle: Path) -> None:
    trunk = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert trunk <= kinds_of_layers(golden_bundle / "trunk.onnx")
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    feed_forward = {"gate_proj", "up_proj", "down_proj"}
    decoder = attention | feed_forward | {"lm_head"}
    assert decoder <= kinds_of_layers(golden_bundle / "decoder.onnx")


def test_int4_leaves_the_head_at_8_bits_and_blocks_whole(golden_bundle: Path) -> None:
    g = Graph.read(golden_bundle / "decoder.onnx")
    plan = weight_only_plan(g, "int4", 128)
    for layer in find_layers(g):
        scheme = plan.schemes[layer.weight]
        if layer.weight.endswith("lm_head.weight"):
            assert scheme.kind == "w8"
        elif scheme.kind == "w4":
            assert layer.inputs % scheme.block == 0


def test_small_int4_weights_stay_packed(tmp_path: Path) -> None:
    """Small weights are stored inside the .onnx file, larger ones beside it; both are read back packed."""
    for columns in (8, 64):
        g = Graph("product")
        x = g.input("x", "float32", [1, 128])
        y = g.MatMul(x, g.weight(Tensor.of("w.weight", matrix(128, columns, 0, 1.0))))
        g.output(y, "y", "float32", [1, columns])
        quantize(g, weight_only_plan(g, "int4"))
        g.save(tmp_path / "product.onnx")
        written = g.weights["w.weight.int4"].stored().reshape(-1)
        read = Graph.read(tmp_path / "product.onnx").weights["w.weight.int4"]
        assert read.dtype == "int4" and read.tensor.shape == (128, columns)
        np.testing.assert_array_equal(read.stored(), written)


def test_weights_are_rounded_once_and_one_at_a_time(
    golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ppllava_edge.export.quantisation import quantize as module

    calls: list[str] = []
    real = module.round_int8
    monkeypatch.setattr(module, "round_int8", lambda *a: (calls.append("x"), real(*a))[1])
    g = Graph.read(golden_bundle / "decoder.onnx")
    records = quantize(g, weight_only_plan(g, "int8"))
    assert not calls, "nothing is loaded before the graph is saved"
    g.save(tmp_path / "decoder.onnx")
    assert len(calls) == len(records) and all(record.sqnr and record.sqnr > 30 for record in records)


def test_widening_keeps_the_values(tmp_path: Path) -> None:
    """fp16 → float32: the graph's types change, its results don't (beyond fp16's rounding of activations)."""
    flags = ("--precision", "fp16", "--no-tokenizer")
    run = run_command("ppllava-export", GOLDEN / "vicuna_tiny_bt", "-o", tmp_path / "half", *flags)
    assert run.returncode == 0
    run = run_command("ppllava-export", tmp_path / "half", "-o", tmp_path / "single", "--precision", "fp32")
    assert run.returncode == 0, run.stderr
    for a, b in zip(logits_and_features(tmp_path / "half"), logits_and_features(tmp_path / "single")):
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0.05, atol=0.03)
    for name in ("trunk", "temporal", "question", "similarity", "pooling", "decoder"):
        g = to_float32(Graph.read(tmp_path / "half" / f"{name}.onnx"))
        assert not [w for w in g.weights.values() if w.dtype == "float16"]
