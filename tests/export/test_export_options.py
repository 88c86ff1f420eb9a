"""The options of ppllava-export, and options that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.commands import assert_one_line_error, run_command
from helpers.exporting import export, nothing_left
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.export.quantisation.precision import parse_precision
from ppllava_edge.runtime import Pipeline


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
def test_impossible_options_are_refused(golden: Path, flags: tuple[str, ...], words: str) -> None:
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
def test_malformed_options_are_refused(golden: Path, flags: tuple[str, ...]) -> None:
    assert_one_line_error(export(golden, *flags))
    assert nothing_left(golden)


def test_precision_per_part() -> None:
    assert set(parse_precision("fp32").parts.values()) == {"fp32"}
    mixed = parse_precision("vision=fp32,decoder=int4,kv=int8")
    types = [mixed.float_type(stage) for stage in ("trunk", "decoder", "similarity")]
    assert types == ["float32", "float16", "float32"]
    assert mixed.integer("decoder") == "int4" and mixed.integer("trunk") is None
    assert mixed.parts["kv"] == "int8"
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
