"""`ppllava-build --target rtx`: TensorRT-RTX, ahead of time and without a GPU.

The tests build all of nano, and one full-width layer of each stage.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.commands import GOLDEN, assert_one_line_error, run_command
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import find_engine
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.graphs.decode_step import split_head
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.targets.profiles import limits, profiles
from ppllava_edge.engines.targets.tensorrt import builder as tensorrt_target
from ppllava_edge.engines.targets.tensorrt import graphs as tensorrt_graphs
from ppllava_edge.engines.targets.tensorrt import process as tensorrt_process
from ppllava_edge.engines.targets.tensorrt.builder import build_tensorrt
from ppllava_edge.engines.targets.tensorrt.plan import Options, check_possible
from ppllava_edge.engines.targets.tensorrt.worker import Job, build
from ppllava_edge.nano.clips import sample_scene_for_the_readme, write_clip

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'ppllava-edge[rtx]'")

STAGES = {"trunk", "temporal", "question", "similarity", "pooling", "pooling-plugin", "decoder"}
CAPABILITIES = ["8.6", "8.9", "12.0"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4", sample_scene_for_the_readme(), np.random.default_rng(0))
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One full-width layer of each stage, random."""
    from ppllava_edge.bench.models.random_checkpoint import ONE_LAYER, write_random_checkpoint

    folder = tmp_path_factory.mktemp("wide")
    write_random_checkpoint(folder, ONE_LAYER)
    return folder


def export(source: Path, output: Path, precision: str, clips: Path) -> Path:
    extra: dict[str, tuple[Any, ...]] = {
        "fp16": (),
        "int4": ("--weight-only",),
        "int8": ("--calibrate", clips, "--calibration-frames", 2, "--keep-fp16", 0, "--allow-drift"),
    }
    block = ("--block", 128) if precision == "int4" and source != packed_bundle() else ()
    run = run_command(
        "ppllava-export",
        source,
        "-o",
        output,
        "--precision",
        precision,
        "--no-engine",
        *extra[precision],
        *block,
    )
    assert run.returncode == 0, run.stderr
    return output


@pytest.mark.parametrize(
    "model, precision",
    [
        *(pytest.param("nano", p, marks=pytest.mark.slow) for p in ("fp16", "int8", "int4")),
        *(pytest.param("wide", p, marks=pytest.mark.slow) for p in ("fp16", "int8", "int4")),
    ],
)
def test_builds_for_three_generations(
    model: str, precision: str, request: pytest.FixtureRequest, clips: Path, tmp_path: Path
) -> None:
    output = tmp_path / "b"
    if (model, precision) == ("nano", "fp16"):
        shutil.copytree(packed_bundle(), output)
    else:
        source = packed_bundle() if model == "nano" else request.getfixturevalue("wide")
        export(source, output, precision, clips)
    run = run_command("ppllava-build", output, "--target", "rtx", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert set(report["stages"]) == STAGES
    assert report["details"]["capabilities"] == CAPABILITIES
    assert report["library"] == "tensorrt_rtx"
    for file in report["built"]:
        assert file["bytes"] > 10_000, file
        assert 100e6 < file["peak"] < 2.2 * file["predicted"], file
    left = {path.name for path in (output / "engines").iterdir()}
    assert left == {"rtx", ".rtx.log"}, "nothing unfinished is left"
    engine, reason = find_engine(Bundle.open(output), "rtx", verify=True)
    assert engine is not None, reason
    shutil.rmtree(output)


FAMILIES = [
    ("qwen_tiny", ()),
    ("pllava_tiny", ("--pooling", "avp")),
    ("vicuna_tiny_bt", ("--kernel", "2,2,2", "--stride", "1,2,2")),
]


@pytest.mark.slow
@pytest.mark.parametrize("family, extra", FAMILIES)
def test_other_families_build(family: str, extra: tuple[str, ...], tmp_path: Path) -> None:
    """SigLIP and Qwen2, unguided pooling, overlapping windows; heads of 8 (no TensorRT kernel)."""
    run = run_command(
        "ppllava-export",
        GOLDEN / family,
        "-o",
        tmp_path / "b",
        "--precision",
        "fp16",
        "--no-tokenizer",
        *extra,
    )
    assert run.returncode == 0, run.stderr
    run = run_command("ppllava-build", tmp_path / "b", "--target", "rtx", "--capability", "8.9", "--json")
    assert run.returncode == 0, run.stderr
    assert {"trunk", "pooling", "decoder"} <= set(json.loads(run.stdout)["stages"])


@pytest.mark.slow
def test_the_same_bundle_gives_the_same_bytes(tmp_path: Path) -> None:
    manifests = []
    for name in ("a", "b"):
        bundle = Bundle.open(shutil.copytree(packed_bundle(), tmp_path / name))
        engine, _ = build_tensorrt(bundle, "rtx", Options(capabilities=("8.9",), piece_bytes=400_000))
        assert len(engine.stages["decoder"]) > 2, "the decoder is cut"
        manifests.append((engine.folder / "engine.json").read_text())
    assert manifests[0] == manifests[1]


@pytest.mark.slow
def test_an_interrupted_build_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(shutil.copytree(packed_bundle(), tmp_path / "b"))
    options = Options(capabilities=("8.9",))
    run_job = tensorrt_target.run_job

    def interrupted(job: Any, staging: Path, name: str, *rest: Any) -> Any:
        if name == "temporal":
            raise KeyboardInterrupt
        return run_job(job, staging, name, *rest)

    monkeypatch.setattr(tensorrt_target, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_tensorrt(bundle, "rtx", options)
    assert find_engine(bundle, "rtx") == (None, "")
    monkeypatch.undo()
    engine, reports = build_tensorrt(bundle, "rtx", options)
    kept = {report.name for report in reports if report.kept}
    assert {"trunk", "decoder"} <= kept and not kept & {"temporal", "question", "similarity"}
    assert set(engine.stages) == STAGES
    _, others = build_tensorrt(bundle, "rtx", Options(capabilities=("8.6",)))
    assert not any(report.kept for report in others), "engines for other capabilities are built again"


@pytest.mark.slow
def test_the_head_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_graphs, "split_head", lambda g: _split(g, 8000))
    bundle = Bundle.open(shutil.copytree(packed_bundle(), tmp_path / "b"))
    engine, _ = build_tensorrt(bundle, "rtx", Options(capabilities=("8.9",)))
    assert engine.stages["decoder"] == ("decoder.engine",)


def _split(g: Graph, part_bytes: int) -> Graph:
    split = split_head(g, part_bytes)
    products = [sum(node.op_type == "MatMul" for node in graph.nodes) for graph in (g, split)]
    assert products[1] > products[0]
    return split


# -- refused -------------------------------------------------------------------------------------------------


def test_refusals_name_the_nodes(tmp_path: Path) -> None:
    import onnx

    bundle = Bundle.open(packed_bundle())
    for path in bundle.path.glob("similarity.onnx*"):
        shutil.copy(path, tmp_path)
    model = onnx.load(str(tmp_path / "similarity.onnx"), load_external_data=False)
    first, last = model.graph.node[0], model.graph.node[5]
    first.op_type, last.op_type = "Unheard", "Unseen"
    (tmp_path / "similarity.onnx").write_bytes(model.SerializeToString())
    shapes = profiles("similarity", model.graph.input, bundle.manifest, limits(bundle.manifest))
    job = Job(str(tmp_path / "similarity.onnx"), str(tmp_path / "out"), "tensorrt_rtx", shapes, ["8.9"])
    with pytest.raises(EngineError, match=rf"refuses similarity.onnx: .*{first.name} \(Unheard\)") as caught:
        build(job)
    assert f"{last.name} (Unseen)" in str(caught.value)


def test_bad_options_and_bundles(tmp_path: Path, tiny_bundle: Path) -> None:
    nano = shutil.copytree(packed_bundle(), tmp_path / "b")
    assert_one_line_error(
        run_command("ppllava-build", nano, "--target", "rtx", "--capability", "1.0"),
        "compute capability 1.0",
        "8.9",
    )
    assert_one_line_error(
        run_command("ppllava-build", nano, "--target", "rtx", "--capability", "new"), "look like 8.6,8.9"
    )
    assert_one_line_error(run_command("ppllava-build", nano, "--target", "rtx", "--piece", "much"), "much")
    assert_one_line_error(
        run_command("ppllava-build", nano, "--target", "orin"),
        "needs tensorrt, which is not installed",
        "JetPack",
    )
    assert_one_line_error(
        run_command("ppllava-build", tiny_bundle, "--target", "rtx"), "float32", "--precision fp16"
    )


def test_versions_that_are_too_old() -> None:
    manifest = Bundle.open(packed_bundle()).manifest
    with pytest.raises(EngineError, match=r"10\.15 or later, not 10\.3\.0; use --target orin-jp6"):
        check_possible(manifest, "orin", "tensorrt", "10.3.0")
    check_possible(manifest, "orin", "tensorrt", "10.15.1")
    check_possible(manifest, "orin-jp6", "tensorrt", "10.3.0")


def test_a_killed_build_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(shutil.copytree(packed_bundle(), tmp_path / "b"))

    class Killed:
        returncode, stdout = -9, b""

    monkeypatch.setattr(tensorrt_process.subprocess, "run", lambda *_, **__: Killed)
    message = r"building trunk ran out of memory \(it was killed\); it was expected to need \d+\.\d MB: try a"
    with pytest.raises(EngineError, match=message):
        build_tensorrt(bundle, "rtx", Options())
    Killed.returncode, Killed.stdout = 0, b"not json"
    with pytest.raises(EngineError, match="ended with status 0"):
        build_tensorrt(bundle, "rtx", Options())


@pytest.mark.slow
def test_a_note_about_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(shutil.copytree(packed_bundle(), tmp_path / "b"))
    notes: list[str] = []
    monkeypatch.setattr(tensorrt_target, "available_memory", lambda: 300_000_000)
    build_tensorrt(bundle, "rtx", Options(capabilities=("8.9",)), note=notes.append)
    assert "building trunk is expected to need 35" in notes[0]
    assert "300.0 MB are available, 5" in notes[0]
    assert "--piece" in notes[0]


def test_export_builds_engines_too(tmp_path: Path) -> None:
    output = tmp_path / "b"
    run = run_command(
        "ppllava-export",
        packed_bundle(),
        "-o",
        output,
        "--precision",
        "int8",
        "--weight-only",
        "--target",
        "rtx",
        "--target",
        "cuda",
        "--json",
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["engines"] == ["rtx", "cuda"]
    info = json.loads(run_command("ppllava-info", output, "--json").stdout)
    assert info["facts"]["engines"] == "cpu; cuda; rtx"
    assert_one_line_error(
        run_command("ppllava-export", packed_bundle(), "-o", tmp_path / "c", "--target", "orin"),
        "--target orin needs tensorrt",
        "doctor",
    )
    assert_one_line_error(
        run_command("ppllava-export", packed_bundle(), "-o", tmp_path / "c", "--target", "toaster"),
        "'toaster' is unknown",
    )
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_stale_engine_is_not_used(tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(packed_bundle(), tmp_path / "b"))
    engine, _ = build_tensorrt(bundle, "rtx", Options(capabilities=("8.9",)))
    description = engine.folder / "engine.json"
    fields = json.loads(description.read_text())
    description.write_text(json.dumps({**fields, "made_by": {"tensorrt_rtx": "1.0.0"}}))
    _, reason = find_engine(bundle, "rtx")
    assert "was built with tensorrt_rtx 1.0.0" in reason
    assert "--target rtx --force" in reason
    description.write_text(json.dumps(fields))
    file = engine.folder / "trunk.engine"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    _, reason = find_engine(bundle, "rtx")
    assert "trunk.engine is damaged" in reason, "checked without verify=True: no library may open such a file"
