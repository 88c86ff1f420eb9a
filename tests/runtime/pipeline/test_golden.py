"""Whole models against the original implementation's arrays: checkpoint → ppllava-export → Pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.commands import GOLDEN, run_command
from helpers.golden import VARIANTS, check, run_check
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.targets.build import build_onnxruntime
from ppllava_edge.runtime import Pipeline
from ppllava_edge.runtime.language.prompt_lookup import PromptLookup
from ppllava_edge.runtime.pipeline.base import BasePipeline
from ppllava_edge.runtime.pipeline.cpu import CpuPipeline


@VARIANTS
def test_variant_matches_the_original(
    variant: int, exports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_check(variant, exports, monkeypatch, capsys)


@VARIANTS
def test_lowered_graphs_match_the_original(
    variant: int, exports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Basic opset-20 operators and a cache that grows: what JetPack 6 gets."""
    opened = []

    class Lowered:
        @classmethod
        def open(cls, bundle: Path, device: str = "cpu") -> BasePipeline:
            build_onnxruntime(Bundle.open(bundle), "lowered")
            opened.append(Pipeline.open(bundle, device, engine="lowered"))
            assert opened[-1].engine is not None and opened[-1].stage("trunk").path.parent.name == "lowered"
            return opened[-1]

    monkeypatch.setattr("ppllava_edge.runtime.Pipeline", Lowered)
    run_check(variant, exports, monkeypatch, capsys)
    assert opened


@VARIANTS
def test_looking_ahead_changes_no_answer(
    variant: int, exports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """engines/cpu with drafts verified several in a pass; every other draft is wrong somewhere."""
    lookups: list[PromptLookup] = []

    class Drafts(PromptLookup):
        def __init__(self, truth: list[int]):
            super().__init__()
            self.truth = truth

        def draft(self, ids: list[int], most: int) -> list[int]:  # type: ignore[override]
            guess = self.truth[len(ids) : len(ids) + min(most, 7)]
            if self.passes % 2 and guess:
                guess[self.passes % len(guess)] += 1
            return guess

    class LookingAhead(CpuPipeline):
        @classmethod
        def open(cls, bundle: Path, device: str = "cpu") -> BasePipeline:
            build_onnxruntime(Bundle.open(bundle), "cpu")
            return LookingAhead(Bundle.open(bundle), device, engine="cpu")

        def generate(self, prompt, max_new_tokens, stop_ids=(), sampling=None, lookup=None):  # type: ignore[no-untyped-def]
            lookups.append(Drafts(list(super().generate(prompt, max_new_tokens, stop_ids, sampling))))
            return super().generate(prompt, max_new_tokens, stop_ids, sampling, lookups[-1])

    monkeypatch.setattr("ppllava_edge.runtime.Pipeline", LookingAhead)
    run_check(variant, exports, monkeypatch, capsys)
    assert all(
        0 < one.accepted < one.proposed and one.passes < len(one.truth)
        for one in lookups
        if len(one.truth) > 15
    )


def test_fp16_stays_close(tmp_path: Path) -> None:
    """The same graphs with fp16 weights and activations; similarity stays fp32."""
    import numpy as np

    bundle = tmp_path / "half"
    run = run_command(
        "ppllava-export", GOLDEN / "vicuna_tiny", "-o", bundle, "--precision", "fp16", "--no-tokenizer"
    )
    assert run.returncode == 0, run.stderr
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["precision"]["decoder"] == "fp16" and manifest["precision"]["similarity"] == "fp32"
    p = Pipeline.open(bundle)
    arrays = dict(np.load(GOLDEN / "vicuna_tiny" / "cases" / "video_short.npz"))
    features = p.encode_frames(check.media_arrays(GOLDEN)["video8"])
    q = p.encode_question(arrays["clip_ids"].astype(np.int64), arrays["clip_mask"].astype(np.int64))
    assert np.abs(p.similarity(features, q) - arrays["similarity"][0]).max() < 5e-3
    assert np.abs(q - arrays["text_embeds"]).max() < 2e-2
