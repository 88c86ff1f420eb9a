"""Graphs and weights from strangers: what does not fit the manifest is one line, and little memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from helpers.commands import SAMPLE, assert_one_line_error, run_command
from ppllava_edge.engines.backends.onnxruntime_device_stage import OrtDeviceStage
from ppllava_edge.engines.backends.onnxruntime_stage import Stage
from ppllava_edge.engines.backends.weight_files import FIELDS, check_weight_files
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import ENGINE
from ppllava_edge.engines.bundle.integrity import hash_file
from ppllava_edge.engines.bundle.manifest import MANIFEST
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import BundleError, EngineError, PPLLaVAError
from ppllava_edge.engines.targets.build import build_cpu
from ppllava_edge.runtime import Pipeline


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of nano."""
    return Path(shutil.copytree(packed_bundle(), tmp_path / "inside" / "bundle"))


def rehash(path: Path) -> None:
    """Write the files' sizes and hashes into a bundle's or an engine's manifest, as a forger would."""
    contents = json.loads(path.read_text())
    for name in contents["files"]:
        file = path.parent / name
        contents["files"][name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    path.write_text(json.dumps(contents))


def one_line(error: PPLLaVAError) -> str:
    assert str(error).isprintable() and len(str(error)) < 800
    return str(error)


# -- weights outside the bundle ------------------------------------------------------------------------------


def external(location: str, name: str = "w") -> TensorProto:
    """A tensor whose data is in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def in_graph(tensor: TensorProto) -> onnx.ModelProto:
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [out], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def in_attribute(tensor: TensorProto) -> onnx.ModelProto:
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Constant", [], ["y"], value=tensor)], "g", [], [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def in_branch(tensor: TensorProto) -> onnx.ModelProto:
    inner = in_graph(tensor).graph
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [], [out], [condition])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    body = [helper.make_node("Constant", [], ["b"], value=tensor)]
    function = helper.make_function("f", "F", [], ["b"], body, opsets)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("F", [], ["y"], domain="f")], "g", [], [out])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])


PLACES = (in_graph, in_attribute, in_branch, in_function)
LOCATIONS = ("../secret", "{}/secret", "sub/../../secret", "link", "*/_ORT_MEM_ADDR_/*", "..", "", "a\nb")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with weights in it, a secret beside it, and a link from one to the other."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in (folder / "w.data", tmp_path / "secret"):
        path.write_bytes(np.array([1, 2], np.float32).tobytes())
    (folder / "link").symlink_to("../secret")
    return folder


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", LOCATIONS)
def test_weights_outside_the_bundle_are_not_read(
    weights: Path, location: str, place: Callable[[TensorProto], onnx.ModelProto]
) -> None:
    """By our own check, which older versions of ONNX Runtime need, and by the installed version."""
    path = weights / "graph.onnx"
    path.write_bytes(place(external(location.format(weights.parent))).SerializeToString())
    with pytest.raises(BundleError) as found:
        check_weight_files(path)
    assert "graph.onnx" in one_line(found.value) or "link" in str(found.value)
    with pytest.raises(EngineError) as refused:
        Stage(path)
    one_line(refused.value)


@pytest.mark.parametrize("place", PLACES)
def test_weights_inside_the_bundle_are_read(
    weights: Path, place: Callable[[TensorProto], onnx.ModelProto]
) -> None:
    path = weights / "graph.onnx"
    path.write_bytes(place(external("w.data")).SerializeToString())
    check_weight_files(path)
    if place in (in_graph, in_branch):  # ONNX Runtime takes no external data in attributes
        np.testing.assert_array_equal(Stage(path)()[0], [1, 2])


@pytest.mark.parametrize("stage", [Stage, lambda path: OrtDeviceStage(path, None, on_cpu=True)])
def test_weights_are_checked_for_older_versions(
    weights: Path, monkeypatch: pytest.MonkeyPatch, stage: Any
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    (weights / "graph.onnx").write_bytes(in_graph(external("../secret")).SerializeToString())
    with pytest.raises(BundleError, match="leaves the bundle"):
        stage(weights / "graph.onnx")


@pytest.mark.parametrize("parts", [["value", "key"], ["key", "value", "key"], ["key", "value", "value"]])
def test_odd_encodings_of_a_location_are_found(weights: Path, parts: list[str]) -> None:
    """Protobuf allows fields in any order, and repeated; the last one counts."""
    key, value = b"\x0a\x08location", b"\x12\x09../secret"
    entry = b"".join(key if part == "key" else value for part in parts)
    tensor = b"\x6a" + bytes([len(entry)]) + entry + b"\x70\x01"
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    (weights / "graph.onnx").write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
    assert onnx.load(weights / "graph.onnx", load_external_data=False).graph.initializer[0].external_data
    with pytest.raises(BundleError, match="leaves the bundle"):
        check_weight_files(weights / "graph.onnx")


def test_every_message_that_can_hold_weights_is_searched() -> None:
    """FIELDS against the definition of ONNX, as the installed package has it."""
    found: dict[str, dict[int, str]] = {}

    def visit(kind: Any) -> None:
        if kind.name not in found:
            inner = {f.number: f.message_type for f in kind.fields if f.message_type is not None}
            found[kind.name] = {number: message.name for number, message in inner.items()}
            for message in inner.values():
                visit(message)

    def holds_weights(kind: str, seen: tuple[str, ...] = ()) -> bool:
        below = (name for name in found[kind].values() if name not in seen)
        return kind == "TensorProto" or any(holds_weights(name, (*seen, kind)) for name in below)

    visit(onnx.ModelProto.DESCRIPTOR)
    needed = {
        kind: {number: name for number, name in fields.items() if holds_weights(name)}
        for kind, fields in found.items()
        if holds_weights(kind) and kind != "TensorProto"
    }
    needed["TensorProto"] = {TensorProto.EXTERNAL_DATA_FIELD_NUMBER: "StringStringEntryProto"}
    assert needed == FIELDS


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_graphs_are_searched_or_refused(weights: Path, data: st.DataObject) -> None:
    content = bytearray((packed_bundle() / "similarity.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (weights / "graph.onnx").write_bytes(content)
    (weights / "similarity.onnx.data").touch()
    try:
        check_weight_files(weights / "graph.onnx")
    except BundleError as error:
        one_line(error)


@pytest.mark.parametrize("damage", ["garbage", "type", "link", "above", "short", "missing"])
def test_a_build_and_an_export_refuse_foreign_graphs_in_one_line(bundle: Path, damage: str) -> None:
    """Both read graphs with the package onnx, and copy their weights."""
    path = bundle / "trunk.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    location = next(entry for entry in tensor.external_data if entry.key == "location")
    if damage == "type":
        tensor.data_type = TensorProto.BFLOAT16
    elif damage == "short":
        tensor.dims[0] = 1 << 40
    else:
        location.value = {"link": "link", "above": "../bundle/trunk.onnx.data"}.get(damage, "missing")
    (bundle / "link").symlink_to(packed_bundle() / "trunk.onnx.data")
    path.write_bytes(b"\xff" * 100 if damage == "garbage" else model.SerializeToString())
    rehash(bundle / MANIFEST)
    output = bundle.parent / "output"
    assert_one_line_error(run_command("ppllava-build", bundle))
    assert_one_line_error(run_command("ppllava-export", bundle, "-o", output))
    assert_one_line_error(run_command("ppllava-info", bundle, "--fit", "8GB"))
    assert not (bundle / "engines" / "cpu").exists() and not output.exists()


# -- graphs that don't fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sequence", "optional", "text", "bfloat16"])
def test_inputs_of_unknown_types_are_one_line(tmp_path: Path, kind: str) -> None:
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    inputs = {
        "sequence": helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None),
        "optional": helper.make_value_info("x", helper.make_optional_type_proto(tensor)),
        "text": helper.make_tensor_value_info("x", TensorProto.STRING, [1]),
        "bfloat16": helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [1]),
    }
    nodes = {
        "sequence": helper.make_node("ConcatFromSequence", ["x"], ["y"], axis=0),
        "optional": helper.make_node("OptionalGetElement", ["x"], ["y"]),
    }
    node = nodes.get(kind, helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [inputs[kind]], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "trunk.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="which no stage has"):
        Stage(tmp_path / "trunk.onnx")


def test_operators_of_other_libraries_and_compiled_graphs_are_one_line(tmp_path: Path) -> None:
    """Nodes that name another file, a library or themselves."""
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid(name, 1) for name in ("com.microsoft", "custom", "f")]
    compiled = {"embed_mode": 0, "ep_cache_context": "../secret", "main_context": 1}
    recursive = [helper.make_node("F", [], ["y"], domain="f")]
    for node in (
        helper.make_node("EPContext", [], ["y"], domain="com.microsoft", **compiled),
        helper.make_node("Op", [], ["y"], domain="custom"),
        recursive[0],
    ):
        model = helper.make_model(
            helper.make_graph([node], "g", [], [out]),
            opset_imports=[helper.make_opsetid("", 21), *opsets],
            functions=[helper.make_function("f", "F", [], ["y"], recursive, [helper.make_opsetid("f", 1)])],
            ir_version=10,
        )
        (tmp_path / "trunk.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(EngineError) as found:
            Stage(tmp_path / "trunk.onnx")
        assert "can't open trunk.onnx" in one_line(found.value)


@pytest.mark.parametrize(
    ("file", "tensor", "edit"),
    [
        ("trunk", "pixels", "type"),
        ("trunk", "pixels", "rank"),
        ("question", "ids", "rename"),
        ("decoder", "past.0.key", "type"),
        ("decoder", "inputs_embeds", "size"),
        ("similarity", "cosine", "rename"),
    ],
)
def test_a_stage_of_other_inputs_or_outputs_is_one_line(
    bundle: Path, file: str, tensor: str, edit: str
) -> None:
    """The graph is replaced by one that has the same inputs and outputs, but for one change."""
    path = bundle / f"{file}.onnx"
    original = onnx.load(path, load_external_data=False).graph
    values = [*original.input, *original.output]
    for value in values:
        kind = value.type.tensor_type
        if value.name == tensor and edit == "type":
            kind.elem_type = TensorProto.INT32
        elif value.name == tensor and edit == "rank":
            kind.shape.dim.add(dim_value=1)
        elif value.name == tensor and edit == "size":
            kind.shape.dim[-1].dim_value += 1
        elif value.name == tensor:
            value.name = "other"
    nodes = []
    for out in original.output:
        kind = out.type.tensor_type
        size = helper.make_tensor("s", TensorProto.INT64, [len(kind.shape.dim)], [1] * len(kind.shape.dim))
        nodes.append(helper.make_node("Constant", [], [f"{out.name}.size"], value=size))
        zero = helper.make_tensor("z", kind.elem_type, [1], [0])
        nodes.append(
            helper.make_node("ConstantOfShape", [f"{out.name}.size"], [f"{out.name}.raw"], value=zero)
        )
        nodes.append(helper.make_node("Identity", [f"{out.name}.raw"], [out.name]))
    graph = helper.make_graph(nodes, "g", list(original.input), [])
    for out in original.output:
        graph.output.add().CopyFrom(out)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    rehash(bundle / MANIFEST)
    assert_one_line_error(
        run_command("ppllava-info", bundle), f"{file}.onnx", tensor, "the manifest promises"
    )
    with pytest.raises(BundleError) as found:
        Pipeline.open(bundle, engine="standard").load()
    assert tensor in one_line(found.value)


# -- damaged engines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["trunk.onnx", "decoder.onnx", "decoder.onnx.data"])
def test_a_damaged_engine_gives_way_to_the_standard_graphs(bundle: Path, file: str) -> None:
    """Damage that leaves the size as it was."""
    build_cpu(Bundle.open(bundle))
    path = bundle / "engines" / "cpu" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    pipeline = Pipeline.open(bundle)
    assert (
        pipeline.engine is None and file in pipeline.engine_note and "ppllava-build" in pipeline.engine_note
    )
    run = run_command("ppllava-run", SAMPLE, "What color is the circle?", "--model", bundle)
    assert run.stdout.strip() == "red" and file in run.stderr


@pytest.mark.parametrize("stage", ["trunk", "decoder"])
def test_an_engine_that_does_not_open_gives_way_to_the_standard_graphs(bundle: Path, stage: str) -> None:
    """Damage that the hashes don't show: the other stages stay with the engine if they are open."""
    build_cpu(Bundle.open(bundle))
    folder = bundle / "engines" / "cpu"
    (folder / f"{stage}.onnx").write_bytes(b"\xff" * 100)
    rehash(folder / ENGINE)
    run = run_command("ppllava-run", SAMPLE, "What color is the circle?", "--model", bundle)
    assert run.stdout.strip() == "red", run.stderr
    pipeline = Pipeline.open(bundle)
    assert pipeline.engine is not None
    pipeline.load()
    assert pipeline.engine is None and f"{stage}.onnx" in pipeline.engine_note
    assert_one_line_error(
        run_command("ppllava-run", SAMPLE, "What color?", "--model", bundle, "--engine", "cpu"),
        f"{stage}.onnx",
    )
