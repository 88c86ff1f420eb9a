"""Whole models against the arrays that the original implementation made: checkpoint → ppllava-export → Pipeline, stage by stage."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, run_command

_spec = importlib.util.spec_from_file_location("golden_check", GOLDEN / "check.py")
assert _spec and _spec.loader
check = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check)


@pytest.mark.parametrize("variant", range(len(check.VARIANTS)), ids=["-".join(map(str, (v[0], v[1], v[3] or ""))) for v in check.VARIANTS])
def test_variant_matches_the_original(variant: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    export = f"{sys.executable} -m ppllava_edge.export.cli"
    monkeypatch.setattr(check, "VARIANTS", [check.VARIANTS[variant]])
    monkeypatch.setattr(sys, "argv", ["check.py", "--golden", str(GOLDEN), "--export", export])
    status = check.main()
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.startswith("FAIL")]
    assert status == 0 and not failed, "\n".join(failed) or printed


def test_fp16_stays_close(tmp_path: Path) -> None:
    """The same graphs with fp16 weights and activations: similarity stays fp32, so answers of the well-separated cases don't change."""
    import numpy as np
    from ppllava_edge.runtime import Pipeline

    bundle = tmp_path / "half"
    run = run_command("ppllava-export", GOLDEN / "vicuna_tiny", "-o", bundle, "--precision", "fp16", "--no-tokenizer")
    assert run.returncode == 0, run.stderr
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["precision"]["decoder"] == "fp16" and manifest["precision"]["similarity"] == "fp32"
    p = Pipeline.open(bundle)
    arrays = dict(np.load(GOLDEN / "vicuna_tiny" / "cases" / "video_short.npz"))
    features = p.encode_frames(check.media_arrays(GOLDEN)["video8"])
    q = p.encode_question(arrays["clip_ids"].astype(np.int64), arrays["clip_mask"].astype(np.int64))
    assert np.abs(p.similarity(features, q) - arrays["similarity"][0]).max() < 5e-3
    assert np.abs(q - arrays["text_embeds"]).max() < 2e-2
