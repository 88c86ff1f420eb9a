"""Measure the scores: run the float and the quantised model over held-back clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ppllava_edge.calibration.data import Clip
from ppllava_edge.calibration.gate.parity import Scores, compare, divergence, spearman
from ppllava_edge.calibration.model.prompt import ClipQuestion, EmbeddedPrompt, embed_prompt
from ppllava_edge.calibration.model.streamed_model import StreamedModel
from ppllava_edge.runtime.decoding.generate import generate_ids
from ppllava_edge.runtime.language.sampling import Sampler, Sampling
from ppllava_edge.runtime.pipeline.base import BasePipeline

NEW_TOKENS = 32


@dataclass
class Expected:
    """The float model on held-back clips; its results are in the model's value store.

    Attributes:
        model: The float model.
        clips: All clips.
        batches: Samples of each clip in the vision tower, as StreamedModel.put_pixels returns them.
        questions: Questions about held-back clips.
    """

    model: StreamedModel
    clips: list[Clip]
    batches: list[list[int]]
    questions: list[ClipQuestion]

    @property
    def held_back(self) -> list[int]:
        """Indices of the clips that are asked about."""
        return sorted({question.clip for question in self.questions})


@dataclass
class _Comparison:
    """Collects the scores of single clips and questions for averaging."""

    features: list[tuple[float, float]] = field(default_factory=list)
    tokens: list[tuple[float, float]] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)

    def add_prompt(self, want: EmbeddedPrompt, got: EmbeddedPrompt) -> None:
        self.tokens.append(compare(want.visual, got.visual))
        if want.cosine is not None and got.cosine is not None:
            self.ranks.append(spearman(want.cosine, got.cosine))

    def scores(self, logits: Sequence[tuple[np.ndarray, np.ndarray]]) -> Scores:
        """Average the scores. logits: per question, (n, V) of the float and of the quantised model."""
        divergences = np.concatenate([divergence(want, got) for want, got in logits])
        agreements = np.concatenate([want.argmax(axis=1) == got.argmax(axis=1) for want, got in logits])
        features = np.mean(self.features, axis=0)
        visual = np.mean(self.tokens, axis=0)
        return Scores(
            feature_cosine=float(features[0]),
            feature_sqnr=float(features[1]),
            rank_correlation=float(np.mean(self.ranks)) if self.ranks else 1.0,
            token_cosine=float(visual[0]),
            token_sqnr=float(visual[1]),
            divergence=float(divergences.mean()),
            agreement=float(agreements.mean()),
            clips=len(self.features),
            questions=len(logits),
            positions=len(divergences),
        )


def measure(expected: Expected, pipeline: BasePipeline, new_tokens: int = NEW_TOKENS) -> Scores:
    """Compare a quantised bundle with the float model.

    The quantised model answers; the float model reads the same answer and gives its own logits at every
    position. The bundle runs in its own pipeline, so the scores hold for the bundle as users run it.

    Args:
        expected: The float model on held-back clips.
        pipeline: The quantised bundle, opened.
        new_tokens: Maximum tokens of an answer.
    """
    model = expected.model
    assert model.text is not None
    comparison = _Comparison()
    features: dict[int, np.ndarray] = {}
    for clip in expected.held_back:
        features[clip] = pipeline.encode_frames(expected.clips[clip].pixels()).astype(np.float32)
        comparison.features.append(compare(model.values.get(clip, "features"), features[clip]))
    answers: dict[int, tuple[list[int], np.ndarray]] = {}
    for asked in expected.questions:
        prompt = embed_prompt(pipeline, model.text, features[asked.clip], asked.question)
        ids, logits = _answer(pipeline, prompt.embeds, new_tokens)
        answers[asked.index] = ids, logits
        expected_prompt = model.embed(asked.clip, asked.question, ids[:-1])
        comparison.add_prompt(expected_prompt, prompt)
        model.put_prompt(asked.index, expected_prompt.embeds)
    want = model.logits([asked.index for asked in expected.questions])
    return comparison.scores([(want[index][-len(ids) :], got) for index, (ids, got) in answers.items()])


def measure_streamed(expected: Expected, quantised: StreamedModel) -> Scores:
    """Compare models that don't fit in memory.

    Both models read the prompt and, if known, the answer. Nothing is generated: divergence and agreement are
    measured at the last positions of that text.

    Args:
        expected: The float model on held-back clips.
        quantised: The quantised bundle; it is closed afterwards.
    """
    model = expected.model
    assert model.text is not None
    comparison = _Comparison()
    clips = expected.held_back
    for batch in [batch for clip in clips for batch in expected.batches[clip]]:
        quantised.values.put(batch, "pixels", model.values.get(batch, "pixels"))
    quantised.run_vision(clips, expected.batches)
    for clip in clips:
        got = quantised.values.get(clip, "features")
        comparison.features.append(compare(model.values.get(clip, "features"), got))
    positions: dict[int, int] = {}
    for asked in expected.questions:
        answer = model.answer_ids(asked.answer)
        prompts = [m.embed(asked.clip, asked.question, answer) for m in (model, quantised)]
        for m, prompt in zip((model, quantised), prompts):
            m.put_prompt(asked.index, prompt.embeds)
        comparison.add_prompt(*prompts)
        text_after_video = len(model.text.prompt_pieces(asked.question)[1]) + len(answer)
        positions[asked.index] = min(NEW_TOKENS, text_after_video)
    want_logits = model.logits(list(positions))
    got_logits = quantised.logits(list(positions))
    quantised.close()
    return comparison.scores([(want_logits[i][-n:], got_logits[i][-n:]) for i, n in positions.items()])


class _RecordingSampler(Sampler):
    """A greedy sampler that keeps the logits (V,) it chose from."""

    def __init__(self) -> None:
        super().__init__(Sampling())
        self.logits: list[np.ndarray] = []

    def __call__(self, logits: np.ndarray, ids: list[int]) -> int:
        self.logits.append(logits.copy())
        return super().__call__(logits, ids)


def _answer(pipeline: BasePipeline, embeds: np.ndarray, limit: int) -> tuple[list[int], np.ndarray]:
    """Greedy token ids, at most `limit`, and the logits (n, V) that they were chosen from."""
    sampler = _RecordingSampler()
    decoder = pipeline.decoder
    sequence = decoder.start(len(embeds), limit)
    try:
        ids = list(generate_ids(sequence, embeds, limit, sampler, pipeline.manifest.stop_ids))
    finally:
        decoder.finish(sequence)
    return ids, np.stack(sampler.logits)
