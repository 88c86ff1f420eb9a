"""A question about a clip as decoder input, with the intermediate values that the parity gate compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ppllava_edge.runtime.language.text_processor import TextProcessor
from ppllava_edge.runtime.pipeline.base import BasePipeline


@dataclass
class ClipQuestion:
    """A question about a clip.

    Attributes:
        index: Sample number of the prompt.
        clip: Index of the clip.
        question: As a person would type it.
        answer: The right answer; "" if it is unknown.
    """

    index: int
    clip: int
    question: str
    answer: str


class EmbeddedPrompt(NamedTuple):
    """A prompt, embedded for the decoder.

    Attributes:
        embeds: (S, D) float32, text and visual tokens.
        visual: (N, D) float32, the visual tokens among them.
        cosine: (T, rows, columns) float32, every patch's similarity to the question; None if
            pooling isn't guided.
    """

    embeds: np.ndarray
    visual: np.ndarray
    cosine: np.ndarray | None


def embed_prompt(
    pipeline: BasePipeline,
    text: TextProcessor,
    features: np.ndarray,
    question: str,
    answer: Sequence[int] = (),
) -> EmbeddedPrompt:
    """Run everything between the vision tower and the decoder.

    Args:
        pipeline: The model.
        text: Its tokenizers and prompt template.
        features: (T, P, C) of the clip.
        question: The question.
        answer: Token ids that follow the prompt.
    """
    q = cosine = None
    if pipeline.manifest.pooling.guided:
        q = pipeline.encode_question(text.question_ids(question)[0])
        cosine = pipeline.similarity(features, q)
    visual = pipeline.visual_tokens(features, q)
    before, after = text.prompt_pieces(question)
    pieces = [pipeline.embed_tokens(before), visual, pipeline.embed_tokens([*after, *answer])]
    return EmbeddedPrompt(np.concatenate(pieces), visual, cosine)
