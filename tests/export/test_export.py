"""ppllava-export: every way to store a checkpoint, and everything that must be refused by name."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.commands import GOLDEN, assert_one_line_error, run_command
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs import graph
from ppllava_edge.engines.graphs.tensors import Tensor, Weight
from ppllava_edge.export.convert import convert
from ppllava_edge.export.options import Options
from ppllava_edge.export.quantisation.precision import parse_precision
from ppllava_edge.runtime import Pipeline

FP32 = parse_precision("fp32")


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of one golden checkpoint that a test may damage."""
    return Path(
        shutil.copytree(
            GOLDEN / "vicuna_tiny_bt", tmp_path / "checkpoint", ignore=shutil.ignore_patterns("cases")
        )
    )


def export(folder: Path, *flags: object) -> Any:
    return run_command("ppllava-export", folder, "-o", folder.parent / "bundle", "--no-tokenizer", *flags)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def nothing_left(folder: Path) -> bool:
    return {p.name for p in folder.parent.iterdir()} == {folder.name}


# -- ways to store a checkpoint --------------------------------------------------------------------------------------


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
    tensors = {
        name: torch.from_numpy(a.copy()) for name, a in load_file(golden.parent / "kept.safetensors").items()
    }
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
    save_file(
        {name: a.astype(ml_dtypes.bfloat16) for name, a in tensors.items()}, golden / "model.safetensors"
    )
    run = export(golden, "--precision", "fp32")
    assert run.returncode == 0, run.stderr
    p = Pipeline.open(golden.parent / "bundle")
    name = "language_model.model.embed_tokens.weight"
    np.testing.assert_array_equal(
        p.embed_tokens([5])[0], tensors[name][5].astype(ml_dtypes.bfloat16).astype(np.float32)
    )


def test_a_sub_folder(golden: Path) -> None:
    (golden.parent / "outer").mkdir()
    inner = golden.rename(golden.parent / "outer" / "inner")
    run = run_command(
        "ppllava-export",
        inner.parent,
        "--subfolder",
        "inner",
        "-o",
        inner.parent.parent / "b",
        "--no-tokenizer",
    )
    assert run.returncode == 0, run.stderr


def test_a_hub_id_from_the_hubs_own_cache(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a download leaves on the disk, read without a network."""
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
    from ppllava_edge.export.stages.question import stretch_positions

    tensors = load_file(golden / "model.safetensors")
    table = "multi_modal_projector.clip_text_model.embeddings.position_embedding"
    short = np.random.default_rng(0).standard_normal((77, 24)).astype(np.float32)
    stretched = stretch_positions(short)
    ids = np.arange(1, 120)[None] % 250
    answers = []
    for with_tables in (True, False):
        changed = {k: v for k, v in tensors.items() if not k.startswith(table)}
        changed |= (
            {table: stretched, f"{table}_res": stretched} if with_tables else {f"{table}.weight": short}
        )
        save_file(changed, golden / "model.safetensors")
        assert export(golden, "--precision", "fp32", "--force").returncode == 0
        answers.append(Pipeline.open(golden.parent / "bundle").encode_question(ids))
    np.testing.assert_array_equal(*answers)


# -- what the options do ---------------------------------------------------------------------------------------------


def test_pooling_options(golden: Path) -> None:
    pixels = np.random.default_rng(0).standard_normal((8, 3, 84, 84)).astype(np.float32)
    counts = {}
    for name, flags in {
        "as configured": (),
        "overlapping": ("--kernel", "2,4,4", "--stride", "1,1,2"),
        "output size": ("--output-size", "4,3,2"),
        "temperature": ("--pooling-temperature", "0.5"),
        "unguided average": ("--pooling", "pllava", "--output-size", "2,2,2"),
        "mean": ("--pooling", "avp"),
    }.items():
        run = export(golden, "--precision", "fp32", "--force", *flags)
        assert run.returncode == 0, (name, run.stderr)
        p = Pipeline.open(golden.parent / "bundle")
        q = p.encode_question(np.array([[258, 5, 6, 259]])) if p.manifest.pooling.guided else None
        counts[name] = len(p.visual_tokens(p.encode_frames(pixels), q))
    assert counts == {
        "as configured": 16,
        "overlapping": 42,
        "output size": 24,
        "temperature": 16,
        "unguided average": 8,
        "mean": 36,
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--kernel", "2,7,7", "--stride", "2,7,7"), "larger than"),
        (("--kernel", "2,3,3"), "kernel 2,3,3"),
        (("--kernel", "2,3,3", "--stride", "2,3,3", "--output-size", "4,2,2"), "not"),
        (("--kernel", "1,2,2", "--output-size", "8,4,4"), "windows"),
        (("--output-size", "4,9,9"), "can't give"),
        (("--pooling-temperature", "0"), "above 0"),
        (("--valuew-plus",), "SigLIP"),
        (("--template", "nonsense"), "plain_v1"),
        (("--precision", "fp12"), "'fp12'"),
        (("--precision", "eyes=fp16"), "'eyes'"),
        (("--precision", "int2"), "int2"),
        (("--clip", "nobody/nothing-of-that-name"), "nobody/nothing"),
    ],
    ids=str,
)
def test_what_can_not_work_is_refused(golden: Path, flags: tuple[str, ...], words: str) -> None:
    assert_one_line_error(export(golden, *flags), words)
    assert nothing_left(golden)


@pytest.mark.parametrize(
    "flags",
    [
        ("--kernel", "2,3"),
        ("--kernel", "a,b,c"),
        ("--stride", "0,1,1"),
        ("--nonsense",),
        ("--pooling", "other"),
    ],
    ids=str,
)
def test_options_that_do_not_parse(golden: Path, flags: tuple[str, ...]) -> None:
    assert_one_line_error(export(golden, *flags))
    assert nothing_left(golden)


def test_precision_per_part() -> None:
    assert set(parse_precision("fp32").parts.values()) == {"fp32"}
    mixed = parse_precision("vision=fp32,decoder=int4,kv=int8")
    assert (
        mixed.float_type("trunk") == "float32"
        and mixed.float_type("decoder") == "float16"
        and mixed.float_type("similarity") == "float32"
    )
    assert (
        mixed.integer("decoder") == "int4" and mixed.integer("trunk") is None and mixed.parts["kv"] == "int8"
    )
    for wrong in ("", "int2", "vision=int4", "lens=int8", "int8,", "decoder=fp32,kv=fp16"):
        with pytest.raises(PPLLaVAError, match="--precision"):
            parse_precision(wrong)


def test_an_existing_bundle_is_replaced_only_with_force(golden: Path) -> None:
    assert export(golden).returncode == 0
    assert_one_line_error(export(golden), "exists already", "--force")
    assert export(golden, "--force").returncode == 0
    other = golden.parent / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert_one_line_error(
        run_command("ppllava-export", golden, "-o", other, "--no-tokenizer", "--force"), "only bundles"
    )
    assert (other / "thesis.txt").read_text() == "years of work"


# -- damaged checkpoints ---------------------------------------------------------------------------------------------


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


def test_other_things_than_checkpoints(golden: Path, tmp_path: Path) -> None:
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


def test_without_tokenizers_it_says_which_option(golden: Path) -> None:
    assert_one_line_error(
        run_command("ppllava-export", golden, "-o", golden.parent / "b"), "--base", "--no-tokenizer"
    )
    assert nothing_left(golden)


def test_without_the_question_towers_configuration(golden: Path) -> None:
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


def test_linear_rotary_scaling_stretches_positions(golden: Path) -> None:
    from ppllava_edge.export.config.model import Overrides
    from ppllava_edge.export.config.reader import read_model
    from ppllava_edge.export.stages.decoder import rotary_tables

    config = json.loads((golden / "config.json").read_text())
    question = json.loads((golden / "clip_tiny" / "config.json").read_text())
    plain = rotary_tables(read_model(config, question, Overrides()).decoder)
    config["text_config"]["rope_scaling"] = {"type": "linear", "factor": 4.0}
    scaled = rotary_tables(read_model(config, question, Overrides()).decoder)
    for a, b in zip(plain, scaled):
        np.testing.assert_allclose(b.load()[::4], a.load()[:256], atol=1e-6)


# -- faults while writing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["full disk", "interrupt"],
)
def test_a_fault_half_way_leaves_nothing(
    golden: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    real, calls = graph.write_weight, 0

    def store(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 60:
            raise fault
        return real(*arguments)

    monkeypatch.setattr(graph, "write_weight", store)
    expected = PPLLaVAError if isinstance(fault, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="full" if isinstance(fault, OSError) else None):
        convert(Options(str(golden), golden.parent / "bundle", FP32, tokenizer=False))
    assert nothing_left(golden)


def test_a_disk_that_fills_up_says_so_with_its_number() -> None:
    """numpy's own tofile loses the error's number, and with it the clear line."""

    class Full:
        def tell(self) -> int:
            return 0

        def write(self, data: Any) -> int:
            if not len(data):
                return 0
            raise OSError(errno.ENOSPC, "No space left on device")

    weight = Weight(Tensor.of("w", np.zeros(4096, np.float32)), "float32")
    with pytest.raises(OSError) as full:
        graph.write_weight("w", weight, Full(), "w.data")
    assert full.value.errno == errno.ENOSPC


def test_a_place_that_can_not_be_written(golden: Path) -> None:
    (golden.parent / "file").write_text("x")
    assert_one_line_error(
        run_command("ppllava-export", golden, "-o", golden.parent / "file" / "b", "--no-tokenizer"), "file"
    )
