"""Bundles from strangers: whatever is in them, opening is one clear line, soon and in little memory."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.commands import assert_one_line_error, run_command
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import ENGINE, engine_folder, find_engine, read_engine
from ppllava_edge.engines.bundle.manifest import MANIFEST, Manifest
from ppllava_edge.engines.bundle.manifest_parser import read_manifest
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.cli.info import describe
from ppllava_edge.engines.errors import BundleError
from ppllava_edge.engines.targets.build import build_cpu

MEMORY = 64 << 20  # bytes that reading a manifest may take


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano with an engine for the CPU."""
    folder = Path(shutil.copytree(packed_bundle(), tmp_path_factory.mktemp("hostile") / "nano"))
    build_cpu(Bundle.open(folder))
    return folder


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def change(path: Path, place: str, value: Any) -> None:
    """Set one value of a JSON file; the place is its keys, separated by dots."""
    contents = json.loads(path.read_text())
    *outer, last = place.split(".")
    part = contents
    for key in outer:
        part = part[key]
    part[last] = value
    path.write_text(json.dumps(contents))


def refused(path: Path, read: Callable[[Path], object] = read_manifest) -> str:
    """The one line with which reading a file is refused."""
    with pytest.raises(BundleError) as found:
        read(path)
    line = str(found.value)
    assert line.isprintable() and len(line) < 400, line
    return line


def read_engine_json(path: Path) -> object:
    return read_engine(path.parent)


def read_and_describe(path: Path) -> object:
    """Read a manifest and compute from it what ppllava-info prints."""
    facts = describe(Bundle(path.parent, read_manifest(path)))
    assert all(fact.isprintable() for fact in facts.values())
    return facts


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("preprocessing.image_grids", [[65536, 65536]], "$.preprocessing.image_grids"),
        ("preprocessing.image_grids", [[4104, 4104]], "$.preprocessing.image_grids"),
        ("preprocessing.image_grids", [[108, 108]] * 65, "$.preprocessing.image_grids"),
        ("preprocessing.image_grids", [[108, 109]], "not whole tiles of 108"),
        ("preprocessing.size", 216, "preprocessing.size is 216, vision.image_size 108"),
        ("vision.image_size", 1 << 20, "$.vision.image_size"),
        ("vision.grid", [9, 10], "vision.grid [9, 10]"),
        ("vision.grid", [109, 109], "vision.grid [109, 109]"),
        ("vision.hidden_size", 1 << 17, "$.vision.hidden_size"),
        ("vision.states", 256, "the states of 8 frames take"),
        ("vision.default_frames", 4097, "$.vision.default_frames"),
        ("vision.default_frames", 9, "above vision.max_frames"),
        ("vision.max_frames", 1 << 40, "$.vision.max_frames"),
        ("decoder.context", 1 << 40, "$.decoder.context"),
        ("decoder.vocab", 1 << 24, "$.decoder.vocab"),
        ("question.length", 1 << 16, "$.question.length"),
        ("pooling.video.kernel", [2, 10, 3], "a window of 10 rows"),
        ("pooling.image.stride", [1, 0, 3], "$.pooling.image.stride"),
        ("stop_ids", list(range(257)), "$.stop_ids"),
        ("prompt.system", "x" * 70000, "$.prompt.system"),
        ("prompt.image_tag", "video", "$.prompt.image_tag"),
        ("prompt.roles", ["a", "b", "c"], "$.prompt.roles"),
        ("precision", {}, "precision has no decoder"),
        ("name", "\x1b]0;title\x07", "$.name"),
        ("name", "a line break at the end\n", "$.name"),
        ("created_by", "x" * 257, "$.created_by"),
    ],
)
def test_every_number_and_text_has_limits(
    built: Path, tmp_path: Path, place: str, value: Any, words: str
) -> None:
    path = Path(shutil.copy(built / MANIFEST, tmp_path))
    if place == "vision.states":
        change(path, "vision.hidden_size", 1 << 14)
    change(path, place, value)
    assert words in refused(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "decoder.onnx"])
def test_files_that_are_read_whole_are_limited(built: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copy(built / MANIFEST, tmp_path))
    files = json.loads(path.read_text())["files"]
    change(path, "files", files | {name: {"bytes": 1 << 30, "sha256": "0" * 64}})
    assert f"{name} has {1 << 30} bytes, more than" in refused(path)


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        ({"layers": 512, "kv_heads": 1024, "head_size": 4096, "context": 1 << 20}, "KV cache takes"),
        ({"layers": 1 << 12}, "$.decoder.layers"),
        ({"kv_heads": 0}, "$.decoder.kv_heads"),
        ({"kv_dtype": "float64"}, "$.decoder.kv_dtype"),
    ],
    ids=str,
)
def test_the_size_of_the_kv_cache_is_limited(
    built: Path, tmp_path: Path, decoder: dict[str, Any], words: str
) -> None:
    path = Path(shutil.copy(built / MANIFEST, tmp_path))
    change(path, "decoder", json.loads(path.read_text())["decoder"] | decoder)
    assert words in refused(path)


ODD_JSON = {
    "nested": b"[" * 500_000,
    "nested in a fact": b'{"format": "ppllava-edge bundle", "schema": 1, "parity": ' + b'{"a":' * 100_000,
    "large number": b'{"format": "ppllava-edge bundle", "schema": 1' + b"0" * 5000 + b"}",
    "huge exponent": b'{"format": "ppllava-edge bundle", "schema": 1e999999999}',
    "NaN": b'{"format": "ppllava-edge bundle", "schema": NaN}',
    "Infinity": b'{"format": "ppllava-edge bundle", "schema": -Infinity}',
    "duplicate keys": b'{"format": "ppllava-edge bundle", "schema": 1, "schema": 99}',
    "byte order mark": b'\xef\xbb\xbf{"format": "ppllava-edge bundle"}',
    "UTF-16": '{"format": "ppllava-edge bundle"}'.encode("utf-16"),
    "no UTF-8": b'{"format": "ppllava-edge bundle", "schema": 1, "name": "\xff\xfe"}',
    "half a surrogate": b'{"format": "ppllava-edge bundle", "schema": 1, "name": "\\ud800"}',
    "control characters": b'{"format": "ppllava-edge bundle", "schema": 1, "name": "\x1b[2J"}',
    "two values": b'{"format": "ppllava-edge bundle"} {}',
    "empty": b"",
    "too long": b" " * (2 << 20) + b"{}",
}


@pytest.mark.parametrize("name", ODD_JSON)
@pytest.mark.parametrize("file", [MANIFEST, f"engines/cpu/{ENGINE}"])
def test_odd_json_is_one_line(bundle: Path, name: str, file: str) -> None:
    path = bundle / file
    path.write_bytes(ODD_JSON[name].replace(b"bundle", b"engine" if ENGINE in file else b"bundle"))
    assert str(path) in refused(path, read_engine_json if ENGINE in file else read_manifest)


def test_errors_name_the_place_of_the_value(bundle: Path) -> None:
    change(bundle / MANIFEST, "vision.image_size", "large")
    assert_one_line_error(
        run_command("ppllava-info", bundle), "manifest.json is damaged", "$.vision.image_size"
    )


def test_hostile_texts_never_reach_the_terminal(bundle: Path) -> None:
    change(bundle / MANIFEST, "family", "\x1b[2J\nclip")
    change(bundle / MANIFEST, "files", {"\x1b[2J": {"bytes": 1, "sha256": "0" * 64}})
    run = run_command("ppllava-info", bundle)
    assert_one_line_error(run)
    assert "\x1b" not in run.stderr


# -- what a path may be --------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def outside(path: Path) -> None:
    path.symlink_to(__file__)


def circle(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("put", [pipe, folder, device, outside, circle])
@pytest.mark.parametrize("name", [MANIFEST, "decoder.onnx", "tokenizer.json", "embed_tokens.safetensors"])
def test_only_regular_files_inside_are_opened(bundle: Path, name: str, put: Callable[[Path], None]) -> None:
    """A pipe would block whoever opens it; a device never ends."""
    (bundle / name).unlink()
    put(bundle / name)
    assert name in refused(bundle, Bundle.open)


@pytest.mark.parametrize("put", [pipe, folder, device, outside, circle])
@pytest.mark.parametrize("name", [ENGINE, "decoder.onnx"])
def test_an_engine_of_other_files_is_not_used(bundle: Path, name: str, put: Callable[[Path], None]) -> None:
    path = bundle / "engines" / "cpu" / name
    path.unlink()
    put(path)
    engine, problem = find_engine(Bundle.open(bundle), "cpu")
    assert engine is None and name in problem and "ppllava-build" in problem


@pytest.mark.parametrize("name", ["engines", "engines/cpu"])
def test_an_engine_folder_outside_the_bundle_is_not_used(bundle: Path, tmp_path: Path, name: str) -> None:
    shutil.move(bundle / name, tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    engine, problem = find_engine(Bundle.open(bundle), "cpu")
    assert engine is None and "link that leaves the bundle" in problem
    assert_one_line_error(run_command("ppllava-build", bundle, "--force"), "link that leaves the bundle")
    assert list((tmp_path / "elsewhere").rglob("engine.json")), "building doesn't replace it"


def test_links_inside_and_a_link_to_the_bundle_work(bundle: Path, tmp_path: Path) -> None:
    (bundle / "trunk.onnx").rename(bundle / "shared")
    (bundle / "trunk.onnx").symlink_to("shared")
    (tmp_path / "link").symlink_to(bundle)
    opened = Bundle.open(tmp_path / "link")
    assert find_engine(opened, "cpu")[0] is not None


def test_a_file_that_is_swapped_after_its_check_is_not_followed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between resolving a path and opening it, somebody puts a link there."""
    target = bundle / "tokenizer.json"
    real = os.open

    def swapping(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path) == target.resolve() and not target.is_symlink():
            target.unlink()
            target.symlink_to("/etc/hostname")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", swapping)
    assert "tokenizer.json" in refused(bundle, Bundle.open)


# -- engine.json ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("details", [], "$.details"),
        ("details", {"capacity": "many"}, "$.details.capacity"),
        ("details", {"capacity": 1 << 60}, "$.details.capacity"),
        ("details", {"kernel": [1, 2]}, "$.details.kernel"),
        ("details", {"capabilities": 8.9}, "$.details.capabilities"),
        ("details", {"capabilities": [8.9]}, "$.details.capabilities"),
        ("details", {"device": {"a": 1}}, "$.details.device"),
        ("details", {"decoder_profiles": 7}, "$.details.decoder_profiles"),
        ("kv_dtype", "complex64", "$.kv_dtype"),
        ("library", "../x", "$.library"),
        ("cache", "elsewhere", "$.cache"),
        ("made_by", {"../x": "1"}, "$.made_by"),
        ("stages", {"trunk": []}, "stages"),
        ("stages", {"trunk": ["trunk.ort"]}, "doesn't list"),
        ("files", {"a/b": {"bytes": 1, "sha256": "0" * 64}}, "leaves the bundle"),
        ("files", {"trunk.onnx": {"bytes": -1, "sha256": "0" * 64}}, "$.files"),
    ],
    ids=str,
)
def test_values_of_an_engine_are_typed(bundle: Path, place: str, value: Any, words: str) -> None:
    change(engine_folder(bundle, "cpu") / ENGINE, place, value)
    engine, problem = find_engine(Bundle.open(bundle), "cpu")
    assert engine is None and words in problem and problem.isprintable()


# -- anything at all -----------------------------------------------------------------------------------------

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["float16", "ppllava", "../x", "\x00", "x" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def mutated(data: st.DataObject, value: Any) -> Any:
    """JSON with up to three values replaced, removed or added, at any place."""
    value = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 3))):
        part = value
        while data.draw(st.booleans()):
            below = list(part.values()) if isinstance(part, dict) else list(part)
            below = [inner for inner in below if isinstance(inner, (dict, list)) and inner]
            if not below:
                break
            part = data.draw(st.sampled_from(below))
        keys: list[Any] = list(part) if isinstance(part, dict) else list(range(len(part)))
        if not keys:
            continue
        key = data.draw(st.sampled_from(keys))
        action = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove":
            del part[key]
        elif action == "add" and isinstance(part, dict):
            part[data.draw(st.text(max_size=10))] = data.draw(_VALUES)
        else:
            part[key] = data.draw(_VALUES)
    return value


def opens_or_one_line(path: Path, read: Callable[[Path], object]) -> None:
    tracemalloc.start()
    try:
        read(path)
    except BundleError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize(("file", "read"), [(MANIFEST, read_and_describe), (ENGINE, read_engine_json)])
def test_a_mutated_file_opens_or_is_one_line(
    built: Path, tmp_path: Path, data: st.DataObject, file: str, read: Callable[[Path], object]
) -> None:
    original = built / (file if file == MANIFEST else f"engines/cpu/{ENGINE}")
    path = tmp_path / "engines" / "cpu" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mutated(data, json.loads(original.read_text()))))
    opens_or_one_line(path, read)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_bytes_open_or_are_one_line(built: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray((built / MANIFEST).read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path / MANIFEST
    path.write_bytes(content)
    opens_or_one_line(path, read_and_describe)


@pytest.mark.parametrize("filler", [b"[],", b"{},", b'"",', b"0,", b'{"":{}},'])
def test_the_largest_manifest_takes_little_memory(tmp_path: Path, filler: bytes) -> None:
    begin = b'{"format": "ppllava-edge bundle", "schema": 1, "parity": {"x": ['
    path = tmp_path / MANIFEST
    path.write_bytes(begin + filler * (((1 << 20) - len(begin) - 8) // len(filler)) + b"0]}}")
    opens_or_one_line(path, read_manifest)


def test_the_schema_can_be_printed() -> None:
    """docs/bundle.md says how."""
    import msgspec

    schema = msgspec.json.schema(Manifest)
    assert schema["$defs"]["VisionInfo"]["properties"]["image_size"]["maximum"] == 4096
