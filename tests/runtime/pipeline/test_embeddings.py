"""Embeddings that differ from what a manifest promises are refused by the runtime, builds and exports."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from helpers.commands import assert_one_line_error, run_command
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.integrity import hash_file
from ppllava_edge.engines.bundle.manifest import MANIFEST
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import BundleError
from ppllava_edge.runtime.pipeline.embeddings import EmbeddingTable

ROW = np.zeros(128, np.float16)
EMBEDDINGS: dict[str, dict[str, np.ndarray]] = {
    "no table": {"image_newline": ROW},
    "fewer rows": {"embed_tokens": np.zeros((61, 128), np.float16)},
    "another width": {"embed_tokens": np.zeros((62, 64), np.float16)},
    "a vector": {"embed_tokens": np.zeros(62 * 128, np.float16)},
    "whole numbers": {"embed_tokens": np.zeros((62, 128), np.int64)},
    "no scales": {"embed_tokens": np.zeros((62, 128), np.int8)},
    "other scales": {
        "embed_tokens": np.zeros((62, 128), np.int8),
        "embed_tokens.scale": np.ones(3, np.float32),
    },
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_bundle(), tmp_path / "bundle"))


def rehash(path: Path) -> None:
    """Write the embeddings' size and hash into a manifest, as a forger would."""
    contents = json.loads(path.read_text())
    file = path.parent / "embed_tokens.safetensors"
    contents["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_of_other_shapes_are_one_line(bundle: Path, name: str) -> None:
    save_file(EMBEDDINGS[name], bundle / "embed_tokens.safetensors")
    rehash(bundle / MANIFEST)
    with pytest.raises(BundleError, match="embed_tokens"):
        EmbeddingTable(Bundle.open(bundle))
    assert_one_line_error(run_command("ppllava-build", bundle, "--target", "cuda"), "embed_tokens")
    assert_one_line_error(run_command("ppllava-export", bundle, "-o", bundle / "new"), "embed_tokens")
    assert not (bundle / "new").exists()


@pytest.mark.parametrize("length", [2 << 20, 1 << 62])
def test_a_long_header_of_embeddings_is_not_read(bundle: Path, length: int) -> None:
    with open(bundle / "embed_tokens.safetensors", "wb") as file:
        file.write(struct.pack("<Q", length) + b"{" + b" " * (2 << 20))
    rehash(bundle / MANIFEST)
    with pytest.raises(BundleError, match="lists too many tensors"):
        EmbeddingTable(Bundle.open(bundle))


def test_an_image_without_its_newline_is_one_line(bundle: Path) -> None:
    save_file({"embed_tokens": np.zeros((62, 128), np.float16)}, bundle / "embed_tokens.safetensors")
    rehash(bundle / MANIFEST)
    table = EmbeddingTable(Bundle.open(bundle))
    with pytest.raises(BundleError, match="has no image_newline"):
        table.image_newline()
    assert_one_line_error(run_command("ppllava-export", bundle, "-o", bundle / "new"), "no image_newline")
