"""Runs every stage once, so that the first question finds them open and their memory allocated."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from ppllava_edge.runtime.encoding.frame_encoder import BATCH
from ppllava_edge.runtime.pipeline.clip import ClipEncoder
from ppllava_edge.runtime.session.admission import EndedEarly, Patience, Slot
from ppllava_edge.runtime.session.answer import GenerationOptions
from ppllava_edge.runtime.session.context import Session

QUESTION = "What is shown in the video?"
NEW_TOKENS = 2  # prefill, then one decode step


def warm_up(session: Session) -> None:
    """Open all stages and run each once, with the shapes of a first question about a video of black frames.

    The engine lock is held for single calls, as by a question, and never while a stage is opened.

    Raises:
        BundleError, EngineError: If a stage can't be opened or fails, or the model is closed.
        BusyError: If too many questions wait.
    """
    session.load()
    with _admission(session):
        visual = _pool(session, _encode(session))
        pipeline = session.pipeline
        before, after = session.text.prompt_pieces(QUESTION)
        prompt = pipeline.prompt(before, visual, after)
        room = GenerationOptions().max_new_tokens  # the cache is kept for the first question
        with contextlib.closing(pipeline.generate(prompt, room)) as ids:
            for _ in range(NEW_TOKENS):
                with session.engine_lock.hold():
                    next(ids, None)


def _admission(session: Session) -> Slot:
    """Wait for admission, unless the model is closed."""
    try:
        return Patience(cancelled=lambda: session.closed).hold(session.admission)
    except EndedEarly:
        session.check_usable()
        raise


def _encode(session: Session) -> Any:
    """Features (T, P, C) of as many black frames as the model sees by default."""
    pipeline, vision = session.pipeline, session.pipeline.manifest.vision
    count, clip = vision.default_frames, ClipEncoder(session.pipeline)
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))
        pixels = np.zeros((len(numbers), 3, vision.image_size, vision.image_size), np.float32)
        with session.engine_lock.hold():
            clip.add(pixels, numbers, more=numbers[-1] + 1 < count)
    with session.engine_lock.hold():
        features = clip.features(range(count))
        pipeline.wait()
    return features


def _pool(session: Session, features: Any) -> Any:
    """Visual tokens (N, D) of features (T, P, C)."""
    pipeline, q = session.pipeline, None
    with session.engine_lock.hold():
        if pipeline.manifest.pooling.guided:
            q = pipeline.encode_question(session.text.question_ids(QUESTION)[0])
        return pipeline.visual_tokens(features, q)
