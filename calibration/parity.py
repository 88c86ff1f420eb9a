"""The parity gate: a quantised bundle against the float model, on clips that calibration has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppllava_edge.calibration.data import Clip
from ppllava_edge.calibration.reference import Asked, StreamedModel
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.runtime.decoding.generate import generate_ids
from ppllava_edge.runtime.language.sampling import Sampler, Sampling
from ppllava_edge.runtime.pipeline.base import BasePipeline

NEW_TOKENS = 32


class GateError(PPLLaVAError):
    """The quantised model drifted from the float one. Command lines exit with status 3."""

    exit_status = 3


@dataclass(frozen=True)
class Limit:
    """A score's bound: at least, or at most."""

    stage: str
    score: str
    bound: float
    at_least: bool

    def holds(self, value: float) -> bool:
        """Whether a measured value is within it; NaN is not."""
        return bool(value >= self.bound if self.at_least else value <= self.bound)


LIMITS = (
    Limit("vision", "feature_cosine", 0.99, True),
    Limit("similarity", "rank_correlation", 0.97, True),
    Limit("projector", "token_cosine", 0.97, True),
    Limit("decoder", "divergence", 0.05, False),
    Limit("decoder", "agreement", 0.95, True),
)
INT4_LIMITS = {"divergence": 0.15, "agreement": 0.9}  # a decoder of 4 bits is allowed more


@dataclass
class Scores:
    """Means over held-back clips and questions. feature_cosine, feature_sqnr (decibels): of features; rank_correlation: Spearman's, of the
    similarity of all patches; token_cosine, token_sqnr: of visual tokens; divergence: KL(float || quantised) of the next token, nats, over an
    answer of up to 32 tokens; agreement: share of those positions at which both would greedily go on the same way."""

    feature_cosine: float
    feature_sqnr: float
    rank_correlation: float
    token_cosine: float
    token_sqnr: float
    divergence: float
    agreement: float
    clips: int
    questions: int
    positions: int

    def violations(self, int4: bool) -> list[tuple[Limit, float]]:
        """Limits that don't hold, with what was measured."""
        found = []
        for limit in LIMITS:
            if int4 and limit.score in INT4_LIMITS:
                limit = Limit(limit.stage, limit.score, INT4_LIMITS[limit.score], limit.at_least)
            value = float(getattr(self, limit.score))
            if not limit.holds(value):
                found.append((limit, value))
        return found

    def as_dict(self) -> dict[str, Any]:
        """For the manifest and the report."""
        return {
            name: round(value, 5) if isinstance(value, float) else value for name, value in vars(self).items()
        }


def describe(violations: Sequence[tuple[Limit, float]]) -> str:
    """ "decoder: divergence 0.31, at most 0.05 is allowed" """
    return "; ".join(
        f"{limit.stage}: {limit.score.replace('_', ' ')} {value:.3f}, at {'least' if limit.at_least else 'most'} {limit.bound:g} is allowed"
        for limit, value in violations
    )


@dataclass
class Expected:
    """What the float model makes of held-back clips: kept on disk by the model's store."""

    model: StreamedModel
    clips: list[Clip]
    chunks: list[list[int]]
    asked: list[Asked]


def measure(expected: Expected, bundle: BasePipeline, new_tokens: int = NEW_TOKENS) -> Scores:
    """Run both models over held-back clips. The quantised one answers; the float one reads the same answer and says what it would have said.

    The bundle's own pipeline is used: the scores are those of what people will run.
    """
    model = expected.model
    feature, tokens, ranks, answers = [], [], [], dict[int, tuple[list[int], np.ndarray]]()
    quantised_features: dict[int, np.ndarray] = {}
    assert model.text is not None
    for clip in sorted({asked.clip for asked in expected.asked}):
        quantised_features[clip] = bundle.encode_frames(expected.clips[clip].pixels()).astype(np.float32)
        feature.append(compare(model.values.get(clip, "features"), quantised_features[clip]))
    for asked in expected.asked:
        q = cosine = None
        features = quantised_features[asked.clip]
        if bundle.manifest.pooling.guided:
            q = bundle.encode_question(model.text.question_ids(asked.question)[0])
            cosine = bundle.similarity(features, q)
        visual = bundle.visual_tokens(features, q)
        before, after = model.text.prompt_pieces(asked.question)
        embeds = np.concatenate([bundle.embed_tokens(before), visual, bundle.embed_tokens(after)])
        answers[asked.index] = _answer(bundle, embeds, new_tokens)
        want, want_visual, want_cosine = model.embeds(
            model.values.get(asked.clip, "features"), asked.question, answers[asked.index][0][:-1]
        )
        tokens.append(compare(want_visual, visual))
        if cosine is not None and want_cosine is not None:
            ranks.append(spearman(want_cosine, cosine))
        model.put_prompt(asked.index, want)
    expected_logits = model.logits([asked.index for asked in expected.asked])
    pairs = [(expected_logits[index][-len(ids) :], logits) for index, (ids, logits) in answers.items()]
    return _scores(feature, tokens, ranks, pairs, len(quantised_features))


def measure_streamed(expected: Expected, quantised: StreamedModel) -> Scores:
    """The same for models that aren't whole in memory: both read the prompt and, where it is known, the answer; nothing is generated, so
    divergence and agreement are those of the last positions of what they read."""
    model = expected.model
    assert model.text is not None
    clips = sorted({asked.clip for asked in expected.asked})
    for clip in clips:
        for chunk in expected.chunks[clip]:
            quantised.values.put(chunk, "pixels", model.values.get(chunk, "pixels"))
    quantised.run_vision(clips, expected.chunks)
    feature = [
        compare(model.values.get(clip, "features"), quantised.values.get(clip, "features")) for clip in clips
    ]
    tokens, ranks, count = [], [], dict[int, int]()
    for asked in expected.asked:
        answer = model.answer_ids(asked.answer)
        seen = [
            m.embeds(m.values.get(asked.clip, "features"), asked.question, answer) for m in (model, quantised)
        ]
        for m, (embeds, _, _) in zip((model, quantised), seen):
            m.put_prompt(asked.index, embeds)
        tokens.append(compare(seen[0][1], seen[1][1]))
        if seen[0][2] is not None and seen[1][2] is not None:
            ranks.append(spearman(seen[0][2], seen[1][2]))
        count[asked.index] = min(
            NEW_TOKENS, len(model.text.prompt_pieces(asked.question)[1]) + len(answer)
        )  # text positions after the video
    samples = [asked.index for asked in expected.asked]
    want, got = model.logits(samples), quantised.logits(samples)
    quantised.close()
    return _scores(
        feature, tokens, ranks, [(want[i][-count[i] :], got[i][-count[i] :]) for i in samples], len(clips)
    )


def _scores(
    feature: Sequence[tuple[float, float]],
    tokens: Sequence[tuple[float, float]],
    ranks: Sequence[float],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    clips: int,
) -> Scores:
    """Means. pairs: logits (n,V) of the float and of the quantised model at the same positions, by question."""
    divergences = np.concatenate([divergence(want, got) for want, got in pairs])
    agreements = np.concatenate([want.argmax(axis=1) == got.argmax(axis=1) for want, got in pairs])
    features, visual = np.mean(feature, axis=0), np.mean(tokens, axis=0)
    return Scores(
        float(features[0]),
        float(features[1]),
        float(np.mean(ranks)) if ranks else 1.0,
        float(visual[0]),
        float(visual[1]),
        float(divergences.mean()),
        float(agreements.mean()),
        clips,
        len(pairs),
        len(divergences),
    )


class _RecordingSampler(Sampler):
    """Greedy, and keeps the logits (V,) that it chose from."""

    def __init__(self) -> None:
        super().__init__(Sampling())
        self.logits: list[np.ndarray] = []

    def __call__(self, logits: np.ndarray, ids: list[int]) -> int:
        self.logits.append(logits.copy())
        return super().__call__(logits, ids)


def _answer(pipeline: BasePipeline, embeds: np.ndarray, limit: int) -> tuple[list[int], np.ndarray]:
    """Greedy token ids, at most `limit`, and the logits (n, V) that they were chosen from."""
    sampler, decoder = _RecordingSampler(), pipeline.decoder
    sequence = decoder.start(len(embeds), limit)
    try:
        ids = list(generate_ids(sequence, embeds, limit, sampler, pipeline.manifest.stop_ids))
    finally:
        decoder.finish(sequence)
    return ids, np.stack(sampler.logits)


def compare(want: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Mean cosine of rows, and the signal-to-noise ratio in decibels."""
    a, b = (
        want.reshape(-1, want.shape[-1]).astype(np.float64),
        got.reshape(-1, got.shape[-1]).astype(np.float64),
    )
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = float(((a * b).sum(axis=1) / np.maximum(norms, 1e-30)).mean())
    noise = float(np.square(a - b).sum())
    return cosine, float(min(10 * np.log10(np.square(a).sum() / noise), 99.0)) if noise > 0 else 99.0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two maps; 1 for the same order."""
    ranks = [
        np.argsort(np.argsort(x.reshape(-1), kind="stable"), kind="stable").astype(np.float64) for x in (a, b)
    ]
    if len(ranks[0]) < 2:
        return 1.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def divergence(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """KL(softmax(want) || softmax(got)) of every row, nats."""
    p, q = _log_softmax(want), _log_softmax(got)
    return np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
