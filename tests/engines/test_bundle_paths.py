"""Names and places of bundles, engines and caches that can't work are one line; others open quickly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.commands import assert_one_line_error, run_command
from ppllava_edge.engines.bundle import integrity
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import find_engine
from ppllava_edge.engines.bundle.manifest import MANIFEST
from ppllava_edge.engines.bundle.manifest_parser import read_manifest
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import BundleError, PPLLaVAError
from ppllava_edge.runtime.vision.feature_cache import FeatureCache


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_bundle(), tmp_path / "bundle"))


@pytest.mark.parametrize("name", ["~nobody-of-this-name/bundle", "x" * 300, "\0"])
def test_names_that_no_folder_has(name: str) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.open(name)
    if name != "\0":  # no argument of a command holds it
        assert_one_line_error(run_command("ppllava-info", name), "no bundle at")
        run = run_command("ppllava-export", name, "-o", "nowhere", "--no-tokenizer")
        assert_one_line_error(run, name[:20])


@pytest.mark.parametrize("place", ["engines", "engines/cpu"])
@pytest.mark.parametrize("put", [lambda path: path.symlink_to(path.name), Path.touch, os.mkfifo])
def test_odd_things_in_the_place_of_an_engine(bundle: Path, place: str, put: Callable[[Path], None]) -> None:
    """They are reported or overlooked, and neither replaced nor followed."""
    (bundle / place).parent.mkdir(exist_ok=True)
    put(bundle / place)
    before = os.lstat(bundle / place)
    engine, problem = find_engine(Bundle.open(bundle), "cpu")
    assert engine is None and "\n" not in problem
    assert_one_line_error(run_command("ppllava-build", bundle), "engines")
    assert os.lstat(bundle / place).st_ino == before.st_ino
    assert not list(bundle.rglob("*.part"))


def test_facts_are_plain_values(bundle: Path) -> None:
    """Nested ones could be nested deeper than Python can copy or print."""
    contents = json.loads((bundle / MANIFEST).read_text())
    for section in ("checkpoint", "calibration", "parity"):
        nested = {**contents, section: {"name": "@"}}
        (bundle / MANIFEST).write_text(json.dumps(nested).replace('"@"', "[" * 500 + "]" * 500))
        with pytest.raises(BundleError, match=rf"\$\.{section}\[\.\.\.\]"):
            read_manifest(bundle / MANIFEST)


def test_large_bundles_open_without_a_home_folder(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run under users that no file lists. The hashes are then computed at every open."""

    def no_home(*arguments: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(integrity, "ALWAYS_HASHED", 0)
    assert Bundle.open(bundle).total_bytes
    with pytest.raises(PPLLaVAError, match="XDG_CACHE_HOME"):
        FeatureCache()


@pytest.mark.parametrize("always_hashed", [0, 1 << 40])
def test_a_bundle_that_is_replaced_while_it_is_opened(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, always_hashed: int
) -> None:
    opened = Bundle(bundle, read_manifest(bundle / MANIFEST))
    monkeypatch.setattr(integrity, "ALWAYS_HASHED", always_hashed)
    (bundle / "decoder.onnx").unlink()
    with pytest.raises(BundleError, match="was it replaced meanwhile"):
        opened._check_hashes(False)


def test_plain_files_are_opened_without_resolving_their_path(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resolving took more time than all else: a small bundle opens in 2 ms."""

    def resolve(*arguments: object, **options: object) -> Path:
        raise AssertionError("resolved")

    monkeypatch.setattr(Path, "resolve", resolve)
    Bundle.open(bundle)
