"""engines/cpu answers like the standard graphs, and is used only if it fits the bundle and this machine."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import SAMPLE, assert_one_line_error, run_command
from ppllava_edge.engines.bundle import integrity
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import find_engine
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.pieces import split
from ppllava_edge.engines.targets import build
from ppllava_edge.engines.targets.onnxruntime_cpu import for_cpu
from ppllava_edge.runtime import Pipeline


@pytest.fixture(scope="module", params=["fp16", "int8", "int4"])
def nano(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano at a precision, with only the weights quantised, without an engine."""
    output = tmp_path_factory.mktemp("engine") / str(request.param)
    run = run_command(
        "ppllava-export",
        packed_bundle(),
        "-o",
        output,
        "--precision",
        request.param,
        "--weight-only",
        "--no-engine",
    )
    assert run.returncode == 0, run.stderr
    return output


@dataclass
class Outputs:
    """A pipeline, and its outputs for fixed random inputs."""

    pipeline: Pipeline
    features: np.ndarray
    logits: np.ndarray
    ids: list[int]


def run_pipeline(bundle: Path) -> Outputs:
    p = Pipeline.open(bundle)
    rng = np.random.default_rng(0)
    v = p.manifest.vision
    features = p.encode_frames(rng.standard_normal((4, 3, v.image_size, v.image_size)).astype(np.float32))
    q = p.encode_question(np.array([[1, 5, 9, 2]]))
    embeds = np.concatenate([p.embed_tokens([1, 5]), p.visual_tokens(features, q), p.embed_tokens([7])])
    return Outputs(p, features.astype(np.float32), p.prefill(embeds), list(p.generate(embeds, 6)))


def test_the_engine_answers_as_the_standard_graphs_do(nano: Path, tmp_path: Path) -> None:
    want = run_pipeline(nano)
    built = Path(shutil.copytree(nano, tmp_path / "b"))
    run = run_command("ppllava-build", built, "--target", "cpu", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert set(report["stages"]) == {"trunk", "temporal", "question", "similarity", "pooling", "decoder"}
    got = run_pipeline(built)
    assert want.pipeline.engine is None
    assert got.pipeline.engine is not None
    assert got.pipeline.stage("trunk").path.parent.name == "cpu"
    for a, b in ((want.features, got.features), (want.logits, got.logits)):
        assert float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)) > 0.999
    assert want.ids == got.ids
    answer = run_command("ppllava-run", SAMPLE, "What color is the circle?", "--model", built)
    assert answer.stdout.strip() == "red"


def test_rewrites_use_the_contrib_operators(nano: Path) -> None:
    precision = nano.name
    kinds = {
        name: {node.op_type for node in for_cpu(Graph.read(nano / f"{name}.onnx")).nodes}
        for name in ("trunk", "decoder")
    }
    assert "MultiHeadAttention" in kinds["trunk"]
    assert "GroupQueryAttention" in kinds["decoder"]
    assert not kinds["decoder"] & {"TensorScatter", "RotaryEmbedding", "Attention"}
    if precision != "fp16":
        assert "MatMulNBits" in kinds["decoder"]
        assert "DequantizeLinear" not in kinds["decoder"]


def test_a_decoder_in_pieces(nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder cut like a large one: pieces are opened side by side and run in turn over one KV cache."""
    monkeypatch.setattr(build, "PIECE_BYTES", 1)
    built = Path(shutil.copytree(nano, tmp_path / "b"))
    engine = build.build_cpu(Bundle.open(built))
    assert len(engine.stages["decoder"]) >= 3
    want = run_pipeline(nano)
    got = run_pipeline(built)
    assert len(got.pipeline.open_stage("decoder")) == len(engine.stages["decoder"])
    largest = float(np.abs(want.logits).max())
    np.testing.assert_allclose(got.logits, want.logits, rtol=0.05, atol=0.05 * largest)
    assert got.ids == want.ids


def test_pieces_cover_a_graph_once(nano: Path) -> None:
    g = Graph.read(nano / "trunk.onnx")
    whole = {node.name for node in g.nodes}
    for budget in (1, 100_000, 1 << 40):
        pieces = split(g, budget=budget)
        nodes = [node for piece in pieces for node in piece.graph.nodes]
        names = [node.name for node in nodes if node.op_type not in ("Shape", "Cast")]
        assert len(names) == len(set(names)) and set(names) <= whole
        assert {name for piece in pieces for name in piece.graph.weights} == set(g.weights)
        assert len(pieces) == 1 or budget < 1 << 40


def test_an_engine_that_does_not_fit_is_not_used(nano: Path, tmp_path: Path) -> None:
    built = Path(shutil.copytree(nano, tmp_path / "b"))
    build.build_cpu(Bundle.open(built))
    description = built / "engines" / "cpu" / "engine.json"
    good = json.loads(description.read_text())
    for change, words in (
        ({"bundle": "0" * 64}, "another version of this bundle"),
        ({"made_by": {"onnxruntime": "1.2"}}, "built with onnxruntime 1.2"),
        ({"format": "something"}, "not an engine"),
        ({"stages": {"trunk": ["../../x.onnx"]}}, "leaves the bundle"),
        ({"kv_dtype": "complex"}, "kv_dtype"),
        ({"stages": {"trunk": ["other.onnx"]}}, "doesn't list"),
        ({"files": None}, "damaged"),
    ):
        description.write_text(json.dumps({**good, **change}))
        engine, reason = find_engine(Bundle.open(built), "cpu")
        assert engine is None and words in reason and "ppllava-build" in reason, (words, reason)
    description.write_text(json.dumps(good))
    data = next(description.parent.glob("decoder*.data"))
    data.write_bytes(data.read_bytes()[:-1])
    pipeline = run_pipeline(built).pipeline
    assert pipeline.engine is None and "damaged" in pipeline.engine_note
    info = run_command("ppllava-info", built)
    assert info.returncode == 0 and "not used" in info.stdout
    run = run_command("ppllava-build", built, "--target", "cpu")
    assert run.returncode == 0
    assert find_engine(Bundle.open(built), "cpu")[0] is not None, "building again repairs it"


def test_a_large_engine_is_not_hashed_again_after_its_build(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "ALWAYS_HASHED", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = Path(shutil.copytree(nano, tmp_path / "b"))
    bundle = Bundle.open(built)
    build.build_cpu(bundle)
    hashed: list[str] = []
    real = integrity._sha256
    monkeypatch.setattr(integrity, "_sha256", lambda path, f: hashed.append(path.name) or real(path, f))
    assert find_engine(bundle, "cpu")[0] is not None and hashed == []
    assert find_engine(bundle, "cpu", verify=True)[0] is not None and "decoder.onnx" in hashed


def test_a_build_that_fails_leaves_nothing(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Path(shutil.copytree(nano, tmp_path / "b"))

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Graph, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        build.build_cpu(Bundle.open(built))
    assert list((built / "engines").iterdir()) == []


def test_other_folders_are_refused(tmp_path: Path) -> None:
    assert_one_line_error(run_command("ppllava-build", tmp_path), "not a bundle")
    assert_one_line_error(run_command("ppllava-build", tmp_path / "nowhere"), "no such directory")
