"""Opening bundles: any content on disk either opens or is refused in one line."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.commands import ROOT, assert_one_line_error, run_command
from ppllava_edge.engines.bundle import integrity, packed
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.manifest_parser import read_manifest
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.cli.build import main as build_main
from ppllava_edge.engines.errors import BundleError


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def edit(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_a_bundle_opens_and_its_manifest_round_trips(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.as_json() == json.loads((tiny_bundle / "manifest.json").read_text())


@pytest.mark.parametrize(
    "name", ["decoder.onnx", "embed_tokens.safetensors", "tokenizer.json", "manifest.json", "trunk.onnx.data"]
)
def test_a_missing_file_is_refused(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(BundleError, match=r"missing|no manifest"):
        Bundle.open(copied)


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "tokenizer.json"])
def test_a_flipped_byte_is_refused(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    assert_one_line_error(run_command("ppllava-info", copied), name, "hash")


def test_a_truncated_file_is_refused(copied: Path) -> None:
    os.truncate(copied / "decoder.onnx.data", 100)
    with pytest.raises(BundleError, match="has 100 bytes"):
        Bundle.open(copied)


def test_a_newer_schema_is_refused(copied: Path) -> None:
    edit(copied, {"schema": 99})
    with pytest.raises(BundleError, match=r"schema 99, newer .* upgrade"):
        Bundle.open(copied)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "x\x00y", "a\\b"])
def test_a_path_that_leaves_the_bundle_is_refused(copied: Path, name: str) -> None:
    files = json.loads((copied / "manifest.json").read_text())["files"]
    edit(copied, {"files": {**files, name: {"bytes": 1, "sha256": "0" * 64}}})
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(copied)


def test_a_link_that_leaves_the_bundle_is_refused(copied: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(copied / "tokenizer.json", outside)
    (copied / "tokenizer.json").symlink_to(outside)
    with pytest.raises(BundleError, match="link that leaves"):
        Bundle.open(copied)


def test_other_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, words in (
        (tmp_path / "nothing", "no such directory"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "no manifest.json"),
    ):
        with pytest.raises(BundleError, match=words):
            Bundle.open(path)


@pytest.mark.parametrize("where", ["repository", "elsewhere"])
def test_info_nano_is_the_packed_bundle(where: str, tmp_path: Path) -> None:
    cwd = ROOT if where == "repository" else tmp_path
    assert (cwd / "nano").is_dir() == (where == "repository")
    run = run_command("ppllava-info", "nano", "--json", cwd=cwd)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert Path(report["bundle"]) == packed_bundle() and report["facts"]["name"] == "nano"
    run = run_command("ppllava-info", "nano", "--fit", "1GB", "--json", cwd=cwd)
    assert run.returncode == 0 and "it fits" in run.stdout, run.stderr
    assert_one_line_error(run_command("ppllava-info", "nanoo", cwd=cwd), "no bundle at nanoo")


def test_info_and_build_prefer_a_bundle_in_a_folder_named_nano(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "nano")
    shutil.rmtree(tmp_path / "nano" / "engines", ignore_errors=True)
    run = run_command("ppllava-info", "nano", "--json", cwd=tmp_path)
    assert json.loads(run.stdout)["bundle"] == "nano", run.stderr
    run = run_command("ppllava-build", "nano", "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "nano" / "engines" / "cpu" / "engine.json").is_file()


def test_build_nano_writes_into_the_packed_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(packed_bundle(), tmp_path / "site-packages")
    monkeypatch.setattr(packed, "packed_bundle", lambda: copy)
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(build_main, ["nano", "--json"])
    assert run.exit_code == 0, run.output
    assert (copy / "engines" / "cpu" / "engine.json").is_file()
    assert not list((tmp_path / "nano").iterdir())


def test_large_bundles_are_hashed_once_and_again_after_a_change(
    copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(integrity, "ALWAYS_HASHED", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hashed: list[str] = []
    real = integrity._sha256
    monkeypatch.setattr(integrity, "_sha256", lambda path, f: hashed.append(path.name) or real(path, f))
    Bundle.open(copied)
    count = len(hashed)
    assert count == len(json.loads((copied / "manifest.json").read_text())["files"])
    Bundle.open(copied)
    assert len(hashed) == count, "an unchanged bundle is not hashed again"
    Bundle.open(copied, verify=True)
    assert len(hashed) == 2 * count, "verify hashes all the same"
    data = bytearray((copied / "decoder.onnx.data").read_bytes())
    data[0] ^= 1
    (copied / "decoder.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match="doesn't match its hash"):
        Bundle.open(copied)


def rehash(folder: Path) -> None:
    """Write the files' hashes into the manifest, as a forger would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": integrity.hash_file(folder / name)}
        for name in manifest["files"]
    }
    edit(folder, {"files": files})


def test_a_graph_with_weights_outside_the_bundle_is_refused(copied: Path) -> None:
    import onnx

    model = onnx.load(copied / "trunk.onnx", load_external_data=False)
    outside = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in outside.external_data if e.key == "location").value = "../../secret"
    (copied / "trunk.onnx").write_bytes(model.SerializeToString())
    rehash(copied)
    assert_one_line_error(run_command("ppllava-info", copied), "trunk.onnx")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("decoder", {"layers": 400}),
        ("decoder", {"kv_heads": 1000}),
        ("decoder", {"vocab": 1 << 20}),
        ("vision", {"states": 7}),
        ("vision", {"grid": [4, 4]}),
    ],
    ids=str,
)
def test_shapes_are_checked_before_anything_is_allocated(
    copied: Path, part: str, change: dict[str, Any]
) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    edit(copied, {part: manifest[part] | change})
    assert_one_line_error(run_command("ppllava-info", copied), "the manifest")


_JUNK = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.integers(-3, 3), max_size=4)
    | st.just({})
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in JSON, as keys and indices."""
    paths = [path] if path else []
    items: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value)
    for key, part in items:
        paths += _paths(part, (*path, key))
    return paths


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_the_manifest_is_one_clear_line_or_harmless(
    tiny_bundle: Path, tmp_path: Path, data: st.DataObject
) -> None:
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    damaged = copy.deepcopy(manifest)
    *outer, last = data.draw(st.sampled_from(_paths(manifest)))
    parent = damaged
    for key in outer:
        parent = parent[key]
    if data.draw(st.booleans()) and isinstance(parent, dict):
        del parent[last]
    else:
        parent[last] = data.draw(_JUNK)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(damaged))
    try:
        read_manifest(path)
    except BundleError as error:
        assert "\n" not in str(error) and str(path) in str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200)
    | st.text(max_size=100).map(str.encode)
    | _JUNK.map(lambda v: json.dumps(v).encode())
)
def test_arbitrary_bytes_as_a_manifest(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(BundleError):
        read_manifest(path)
