"""Checkpoints that are damaged, incomplete or of unsupported models are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.commands import GOLDEN, assert_one_line_error, run_command
from helpers.exporting import change_config, export, nothing_left
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.export.convert import convert
from ppllava_edge.export.options import Options
from ppllava_edge.export.quantisation.precision import parse_precision
from ppllava_edge.export.sources.tokenizers import load_tokenizer


def test_missing_unexpected_and_wrongly_shaped_tensors_are_listed_by_name(golden: Path) -> None:
    tensors = load_file(golden / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    tensors["stranger.weight"] = np.zeros(3, np.float32)
    tensors["multi_modal_projector.linear_1.bias"] = np.zeros(47, np.float32)
    save_file(tensors, golden / "model.safetensors")
    run = export(golden)
    assert_one_line_error(
        run, "3 tensors", "missing: language_model.model.norm.weight [48]", "unexpected: stranger.weight [3]"
    )
    assert "wrong shape: multi_modal_projector.linear_1.bias is [47], expected [48]" in run.stderr
    assert nothing_left(golden)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinite_weights_are_named(golden: Path, value: float) -> None:
    tensors = load_file(golden / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = value
    save_file(tensors, golden / "model.safetensors")
    assert_one_line_error(export(golden), name, "NaN or infinite")
    assert nothing_left(golden)


def test_paths_that_are_no_checkpoints(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line_error(export(tmp_path / "empty"), "config.json is missing")
    assert_one_line_error(export(tmp_path / "nothing"), "no such directory")
    assert_one_line_error(export(golden / "config.json"), "is a file")
    change_config(golden, text_config={"model_type": "gpt2"})
    assert_one_line_error(export(golden), "'gpt2'")
    (golden / "config.json").write_text("{")
    assert_one_line_error(export(golden), "JSON")


def test_a_damaged_safetensors_file(golden: Path) -> None:
    (golden / "model.safetensors").write_bytes((golden / "model.safetensors").read_bytes()[:1000])
    assert_one_line_error(export(golden), "safetensors")


def test_a_missing_tokenizer_names_the_option(golden: Path) -> None:
    assert_one_line_error(
        run_command("ppllava-export", golden, "-o", golden.parent / "b"), "--base", "--no-tokenizer"
    )
    assert nothing_left(golden)


def test_a_missing_question_tower_names_the_option(golden: Path) -> None:
    shutil.rmtree(golden / "clip_tiny")
    assert_one_line_error(export(golden), "--clip")
    run = run_command(
        "ppllava-export",
        golden,
        "-o",
        golden.parent / "b",
        "--no-tokenizer",
        "--clip",
        GOLDEN / "vicuna_tiny_bt" / "clip_tiny",
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("text_config", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ("text_config", {"use_sliding_window": True}, "sliding"),
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("text_config", {"hidden_act": "relu"}, "'relu'"),
        ("vision_config", {"model_type": "dinov2"}, "'dinov2'"),
        ("vision_config", {"hidden_act": "swiglu"}, "'swiglu'"),
        (None, {"btadapter_depth": 9}, "btadapter_depth 9"),
        (None, {"frame_shape": [5, 6]}, "frame_shape"),
        (None, {"pooling": "psychic"}, "'psychic'"),
        (None, {"pooling_kernel": "2;3"}, "pooling_kernel"),
    ],
    ids=str,
)
def test_models_that_are_not_supported_are_refused_by_name(
    golden: Path, part: str | None, change: dict[str, Any], words: str
) -> None:
    config = json.loads((golden / "config.json").read_text())
    change_config(golden, **(change if part is None else {part: config[part] | change}))
    assert_one_line_error(export(golden), words)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_and_devices_are_not_read(golden: Path, name: str) -> None:
    """A pipe would block whoever opens it; a device never ends."""
    (golden / name).unlink()
    os.mkfifo(golden / name)
    assert_one_line_error(export(golden), "config.json" if name == "config.json" else "holds no weights")
    (golden / name).unlink()
    (golden / name).symlink_to("/dev/zero")
    assert_one_line_error(export(golden), "config.json" if name == "config.json" else "holds no weights")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "C64"])
def test_tensors_of_other_types_are_named(golden: Path, dtype: str) -> None:
    name, bytes_each = "language_model.model.norm.weight", {"F8_E4M3": 1, "C64": 8}[dtype]
    tensors = load_file(golden / "model.safetensors")
    shape = tensors.pop(name).shape
    save_file(tensors, golden / "model.safetensors")
    file = (golden / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(file[:8], "little")
    size, at = bytes_each * shape[0], len(file) - end
    header = json.loads(file[8:end])
    header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (golden / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + file[end:] + bytes(size)
    )
    assert_one_line_error(export(golden), name, "type that isn't exported")
    assert nothing_left(golden)


@pytest.mark.parametrize("name", ["x" * 300, "a\nb\x1b[31m", "half a \ud800 pair"])
def test_any_name_of_a_model_can_be_written(golden: Path, name: str) -> None:
    change_config(golden, name=name)
    manifest, _ = convert(Options(str(golden), golden.parent / "b", parse_precision("fp32"), tokenizer=False))
    assert manifest.name.isprintable() and Bundle.open(golden.parent / "b").manifest.name == manifest.name


@pytest.mark.parametrize("weight", ["x" * 5000, ["clip"], "a\nb", "~nobody-of-this-name/x"])
def test_a_question_tower_of_an_odd_name(golden: Path, weight: object) -> None:
    change_config(golden, clip_weight=weight)
    run = export(golden)
    assert_one_line_error(run, "--clip")
    assert len(run.stderr) < 500


def test_a_tokenizer_that_makes_the_library_panic(golden: Path) -> None:
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    tokenizer["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (golden / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PPLLaVAError, match="not a tokenizer that this version") as refused:
        load_tokenizer(golden)
    assert str(refused.value).isprintable()
