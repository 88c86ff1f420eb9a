"""Quantised graphs build under TensorRT-RTX, ahead of time and without a GPU: every graph of nano, one full-width layer of each stage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import run_command
from ppllava_edge.engines import rtx
from ppllava_edge.engines.bundle import Bundle
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.nano import bundle_path
from ppllava_edge.nano.clips import sample_scene_for_the_readme, write_clip

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'ppllava-edge[rtx]'")

STAGES = ("trunk", "temporal", "question", "similarity", "pooling", "decoder")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Nano and a full-width layer of each stage, calibrated INT8 and weight-only INT4."""
    import numpy as np
    from ppllava_edge.bench.random_checkpoint import ONE_LAYER, write_random_checkpoint

    folder = tmp_path_factory.mktemp("rtx")
    write_random_checkpoint(folder / "wide", ONE_LAYER)
    (folder / "clips").mkdir()
    write_clip(folder / "clips" / "a.mp4", sample_scene_for_the_readme(), np.random.default_rng(0))
    found = {}
    for name, source, precision, extra in (
        ("nano int8", bundle_path(), "int8", ("--calibrate", folder / "clips", "--keep-fp16", 0)),
        ("nano int4", bundle_path(), "int4", ("--weight-only",)),
        ("wide int8", folder / "wide", "int8", ("--calibrate", folder / "clips", "--calibration-frames", 2, "--keep-fp16", 0)),
        ("wide int4", folder / "wide", "int4", ("--block", 128)),
    ):
        output = folder / name.replace(" ", "-")
        run = run_command("ppllava-export", source, "-o", output, "--precision", precision, "--allow-drift", "--no-engine", *extra)
        assert run.returncode == 0, run.stderr
        found[name] = Bundle.open(output)
    shutil.rmtree(folder / "wide")
    return found


@pytest.mark.parametrize("name", ["nano int8", "nano int4", "wide int8", "wide int4"])
@pytest.mark.parametrize("stage", STAGES)
def test_it_builds_for_two_generations(bundles: dict[str, Bundle], name: str, stage: str) -> None:
    bundle = bundles[name]
    plan = rtx.build(bundle.file(f"{stage}.onnx"), bundle.manifest, ("8.6", "8.9"))
    assert len(plan) > 10_000


def test_refusals_name_the_node(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    import onnx

    bundle = bundles["nano int8"]
    for path in bundle.path.glob("similarity.onnx*"):
        shutil.copy(path, tmp_path)
    model = onnx.load(str(tmp_path / "similarity.onnx"), load_external_data=False)
    model.graph.node[0].op_type = "Unheard"
    (tmp_path / "similarity.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=rf"refuses similarity.onnx: {model.graph.node[0].name}.*Unheard"):
        rtx.build(tmp_path / "similarity.onnx", bundle.manifest)


def test_unknown_cards_are_named(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["nano int8"]
    with pytest.raises(EngineError, match=r"compute capability 1\.0"):
        rtx.build(bundle.file("similarity.onnx"), bundle.manifest, ("1.0",))
