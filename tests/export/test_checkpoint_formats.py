"""Every way to store a checkpoint gives the same bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.commands import assert_one_line_error, run_command
from helpers.exporting import export
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.export.stages.question import stretch_positions
from ppllava_edge.runtime import Pipeline


def graphs_of(bundle: Path) -> dict[str, str]:
    return {name: f.sha256 for name, f in Bundle.open(bundle).manifest.files.items()}


def test_shards_give_the_same_bundle_as_one_file(golden: Path) -> None:
    assert export(golden, "--precision", "fp32").returncode == 0
    want = graphs_of(golden.parent / "bundle")
    tensors = load_file(golden / "model.safetensors")
    names = sorted(tensors)
    (golden / "model.safetensors").unlink()
    where = {}
    for k in range(3):
        file = f"model-{k + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[k::3]}, golden / file)
        where |= dict.fromkeys(names[k::3], file)
    (golden / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    run = export(golden, "--precision", "fp32", "--force")
    assert run.returncode == 0, run.stderr
    assert graphs_of(golden.parent / "bundle") == want

    (golden / "model-00002-of-00003.safetensors").unlink()
    assert_one_line_error(export(golden, "--force"), "shards", "model-00002-of-00003.safetensors")


def test_bin_shards_need_torch_and_never_run_code(golden: Path) -> None:
    (golden / "model.safetensors").rename(golden.parent / "kept.safetensors")
    try:
        import torch
    except ImportError:
        (golden / "pytorch_model.bin").write_bytes(b"PK")
        assert_one_line_error(export(golden), "ppllava-edge[train]")
        return
    arrays = load_file(golden.parent / "kept.safetensors")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    for old in (False, True):
        torch.save(tensors, golden / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        run = export(golden, "--precision", "fp32", "--force")
        assert run.returncode == 0, run.stderr

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (open, (str(golden / "was-here"), "w"))  # type: ignore[return-value]

    torch.save({"image_newline": Evil()}, golden / "pytorch_model.bin")
    assert_one_line_error(export(golden, "--force"), "code")
    assert not (golden / "was-here").exists()


def test_bfloat16_is_read(golden: Path) -> None:
    import ml_dtypes

    tensors = load_file(golden / "model.safetensors")
    halves = {name: a.astype(ml_dtypes.bfloat16) for name, a in tensors.items()}
    save_file(halves, golden / "model.safetensors")
    run = export(golden, "--precision", "fp32")
    assert run.returncode == 0, run.stderr
    p = Pipeline.open(golden.parent / "bundle")
    name = "language_model.model.embed_tokens.weight"
    np.testing.assert_array_equal(p.embed_tokens([5])[0], halves[name][5].astype(np.float32))


def test_a_sub_folder(golden: Path) -> None:
    (golden.parent / "outer").mkdir()
    inner = golden.rename(golden.parent / "outer" / "inner")
    flags = ("--subfolder", "inner", "--no-tokenizer")
    run = run_command("ppllava-export", inner.parent, "-o", inner.parent.parent / "b", *flags)
    assert run.returncode == 0, run.stderr


def test_a_hub_id_from_the_hubs_own_cache(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A downloaded repository is read without a network."""
    cache = golden.parent / "hub" / "models--someone--some-model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc123")
    shutil.copytree(golden, cache / "snapshots" / "abc123" / "inner")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = golden.parent / "from-hub"
    run = run_command(
        "ppllava-export", "someone/some-model", "--subfolder", "inner", "-o", output, "--no-tokenizer"
    )
    assert run.returncode == 0, run.stderr
    assert Bundle.open(output).manifest.checkpoint["name"] == "someone/some-model"
    assert_one_line_error(
        run_command("ppllava-export", "someone/other", "-o", output, "--force"), "someone/other", "hub"
    )


def test_a_plain_clip_position_table_is_stretched(golden: Path) -> None:
    tensors = load_file(golden / "model.safetensors")
    table = "multi_modal_projector.clip_text_model.embeddings.position_embedding"
    short = np.random.default_rng(0).standard_normal((77, 24)).astype(np.float32)
    stretched = stretch_positions(short)
    ids = np.arange(1, 120)[None] % 250
    answers = []
    for with_tables in (True, False):
        changed = {k: v for k, v in tensors.items() if not k.startswith(table)}
        two_tables = {table: stretched, f"{table}_res": stretched}
        changed |= two_tables if with_tables else {f"{table}.weight": short}
        save_file(changed, golden / "model.safetensors")
        assert export(golden, "--precision", "fp32", "--force").returncode == 0
        answers.append(Pipeline.open(golden.parent / "bundle").encode_question(ids))
    np.testing.assert_array_equal(*answers)
