"""What people embed: a VideoQA opens videos, a Video answers questions.

A video is decoded and encoded once, when it is opened. Only pooling depends on the question, so every question after the first costs the
question tower, pooling and the decoder.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engines.errors import EngineError, MediaError, PromptError
from ..engines.prompt_template import PromptTemplate
from .lookup import Lookup
from .pipeline import Pipeline
from .preprocess import preprocess_image, preprocess_video
from .sampling import Sampling
from .text import Detokenizer, TextSide, clean_question, stream_text
from .video import Frames, check_size, read_frames

Progress = Callable[[str, int, int], None]  # what ("decode" or "vision"), done, of how many


@dataclass
class Answer:
    """An answer and what it took.

    text: the answer. finish: "stop" (the model ended it), "length" (max_new_tokens or the context's end) or "stop string".
    frame_indices, frame_times (seconds): the frames that were looked at. visual_tokens, text_tokens, new_tokens: counts.
    timings: seconds for video_decode, vision, question, pooling, prefill, first_token (all before the first token, together), generate
    (after it); video_decode and vision are 0 for every question after a video's first. notes: what people should know. engine: which of the
    bundle's ran. lookup: passes of the decoder after the first, tokens proposed and accepted, if it looked ahead.
    """

    question: str
    text: str
    model: str
    finish: str
    frame_indices: list[int]
    frame_times: list[float]
    visual_tokens: int
    text_tokens: int
    new_tokens: int
    timings: dict[str, float]
    notes: list[str] = field(default_factory=list)
    engine: str = "standard"
    lookup: dict[str, int] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, the first (it belongs to prefill) left out; 0 if there was only one."""
        return (self.new_tokens - 1) / self.timings["generate"] if self.new_tokens > 1 and self.timings["generate"] > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "tokens_per_second": self.tokens_per_second}

    def __str__(self) -> str:
        return self.text


class VideoQA:
    """A model that answers questions about videos.

    bundle: a directory that ppllava-export wrote; None: the packed demonstration model, nano. device: auto | cpu | cuda. threads: of the
    engine. template: a prompt template's name instead of the bundle's own. engine: auto (the fastest that is built and fits), onnxruntime,
    tensorrt, rtx, standard, or a target that ppllava-build built.
    Raises BundleError or EngineError in one line. Safe to use from several threads: every answer has a cache of its own.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | None = None,
        device: str = "auto",
        threads: int | None = None,
        template: str | PromptTemplate | None = None,
        engine: str = "auto",
    ):
        if bundle is None:
            from ..nano import bundle_path

            bundle = bundle_path()
        self.pipeline = Pipeline.open(bundle, device, threads, engine)
        self.text = TextSide(self.pipeline.bundle, template)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.pipeline.manifest.name

    @property
    def is_demo(self) -> bool:
        """Whether this is a demonstration model."""
        return self.pipeline.manifest.demo

    def open(
        self,
        source: str | os.PathLike[str] | Sequence[np.ndarray],
        frames: int | None = None,
        start: float | None = None,
        end: float | None = None,
        progress: Progress | None = None,
    ) -> Video:
        """Decode and encode a video once.

        source: a video file, an image, an animation, a folder of images, or a sequence of RGB uint8 frames (H,W,3), all of which are used
        (frames must be None then). frames: how many to sample, default the model's. start, end: seconds.
        Raises MediaError in one line.
        """
        started = time.perf_counter()
        if isinstance(source, (str, os.PathLike)):
            count = self.pipeline.manifest.vision.default_frames if frames is None else frames
            self.pipeline.check_frames(count)
            read = read_frames(source, count, start, end, None if progress is None else lambda done, of: progress("decode", done, of))
        else:
            read = _given_frames(source, frames)
            self.pipeline.check_frames(len(read.images))
        decoded = time.perf_counter()
        media = "video" if read.kind == "video" or self.pipeline.manifest.pooling.method.startswith("pllava") else "image"
        features, size = self._encode(read, media, progress)
        self.pipeline.wait()
        timings = {"video_decode": decoded - started, "vision": time.perf_counter() - decoded}
        return Video(self, read, features, media, size, timings)

    def _encode(self, read: Frames, media: str, progress: Progress | None) -> tuple[np.ndarray, tuple[int, int] | None]:
        p = self.pipeline
        if media == "image":
            image = read.images[0]
            tiles = preprocess_image(image, p.manifest.preprocessing)
            return p.encode_frames(tiles, media="image"), (image.shape[0], image.shape[1])
        clip, step = p.clip(len(read.indices)), 4
        distinct = list(dict.fromkeys(read.indices))  # short videos repeat frames: encode each once
        places = {index: [at for at, wanted in enumerate(read.indices) if wanted == index] for index in distinct}
        for i in range(0, len(distinct), step):
            batch = distinct[i : i + step]
            pixels = preprocess_video([read.images[places[index][0]] for index in batch], p.manifest.preprocessing)
            clip.add(pixels, [places[index] for index in batch], more=i + step < len(distinct))
            if progress:
                progress("vision", min(i + step, len(distinct)), len(distinct))
        return clip.features(), None


class Video:
    """An encoded video. features (T,P,C): what the model saw, before any question."""

    def __init__(self, qa: VideoQA, read: Frames, features: np.ndarray, media: str, image_size: tuple[int, int] | None, timings: dict[str, float]):
        self.qa, self.frames, self.features, self.media, self.image_size = qa, read, features, media, image_size
        self._unspent, self._lock = timings, threading.Lock()

    def ask(
        self, question: str, max_new_tokens: int = 256, sampling: Sampling | None = None, stop: Sequence[str] = (), look_ahead: bool = False
    ) -> Answer:
        """Answer one question. stop: texts that end the answer. look_ahead: verify several guessed tokens in a pass (runtime/lookup.py).

        Raises PromptError for an empty question or one too long, EngineError if the engine can't look ahead.
        """
        stream = self.stream(question, max_new_tokens, sampling, stop, look_ahead)
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self, question: str, max_new_tokens: int = 256, sampling: Sampling | None = None, stop: Sequence[str] = (), look_ahead: bool = False
    ) -> AnswerStream:
        """The same, as an iterator of pieces of text; its .answer is there when it is exhausted."""
        return AnswerStream(self, clean_question(question), max_new_tokens, sampling or Sampling(), stop, look_ahead)

    def similarity(self, question: str) -> np.ndarray:
        """Cosine (T,rows,columns) float32 of every patch with the question. Raises EngineError if the model pools without the question."""
        pipeline = self.qa.pipeline
        if not pipeline.manifest.pooling.guided:
            raise EngineError(f"{self.qa.name} pools without the question ({pipeline.manifest.pooling.method}): it has no similarity")
        ids, _ = self.qa.text.question_ids(clean_question(question))
        return pipeline.similarity(self.features, pipeline.encode_question(ids))

    def take_unspent(self) -> dict[str, float]:
        """Seconds of decoding and encoding, for whoever asks first; zeros afterwards."""
        with self._lock:
            unspent, self._unspent = self._unspent, {"video_decode": 0.0, "vision": 0.0}
        return unspent


class AnswerStream:
    """Pieces of an answer as they come. close() ends it early; `answer` holds what there is by then."""

    def __init__(self, video: Video, question: str, max_new_tokens: int, sampling: Sampling, stop: Sequence[str], look_ahead: bool = False):
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
        self._video, self._question, self._most = video, question, max_new_tokens
        self._sampling, self._stop, self._look_ahead = sampling, stop, look_ahead
        self._answer: Answer | None = None
        self._run: Generator[str, None, None] = self._generate()

    def __iter__(self) -> Iterator[str]:
        return self._run

    def __next__(self) -> str:
        return next(self._run)

    def close(self) -> None:
        """Stop generating."""
        self._run.close()

    @property
    def answer(self) -> Answer:
        """The finished answer. Raises PromptError while it is being generated."""
        if self._answer is None:
            raise PromptError("the answer is not finished: exhaust the stream, or close it, first")
        return self._answer

    def _generate(self) -> Generator[str, None, None]:
        video, qa = self._video, self._video.qa
        pipeline, started = qa.pipeline, time.perf_counter()
        unspent = video.take_unspent()
        timings, notes = dict(unspent), list(video.frames.notes)
        q = None
        if pipeline.manifest.pooling.guided:
            ids, cut = qa.text.question_ids(self._question)
            q = pipeline.encode_question(ids)
            if cut:
                notes.append("the question is longer than the question tower reads; its end did not guide the pooling")
        at = _lap(timings, "question", started)
        visual = pipeline.visual_tokens(video.features, q, video.media, video.image_size)
        at = _lap(timings, "pooling", at)
        before, after = qa.text.prompt_pieces(self._question)
        embeds = pipeline.prompt(before, visual, after)
        stop_ids = pipeline.manifest.stop_ids
        lookup = Lookup([*before, *after]) if self._look_ahead else None
        new_ids = pipeline.generate(embeds, self._most, stop_ids, self._sampling, lookup)
        detokenizer = Detokenizer(lambda tokens: qa.text.tokenizer.decode(tokens, skip_special_tokens=True), self._stop)
        count, text, finish = 0, "", "length"
        try:
            for token, piece in stream_text(new_ids, detokenizer, stop_ids):
                if token >= 0:
                    count += 1
                    if count == 1:
                        at = _lap(timings, "prefill", at)
                        timings["first_token"] = sum(unspent.values()) + at - started
                    if token in stop_ids:
                        finish = "stop"
                piece = piece if text else piece.lstrip()
                if piece:
                    text += piece
                    yield piece
            if detokenizer.stopped:
                finish = "stop string"
        finally:
            new_ids.close()  # gives the cache back
            timings.setdefault("prefill", 0.0)
            timings.setdefault("first_token", 0.0)
            if lookup is not None and lookup.note:
                notes.append(lookup.note)
            _lap(timings, "generate", at)
            frames = video.frames
            self._answer = Answer(
                self._question, text.rstrip(), qa.name, finish, list(frames.indices), [round(t, 3) for t in frames.times], len(visual),
                len(before) + len(after), count, timings, notes, pipeline.engine_name,
                {"passes": lookup.passes, "proposed": lookup.proposed, "accepted": lookup.accepted} if lookup and not lookup.note else None,
            )  # fmt: skip


def _lap(timings: dict[str, float], name: str, since: float) -> float:
    now = time.perf_counter()
    timings[name] = now - since
    return now


def _given_frames(images: Sequence[np.ndarray], frames: int | None) -> Frames:
    if frames is not None:
        raise MediaError("frames and a sequence of images don't go together: all images that are given are used")
    checked = []
    for i, image in enumerate(images):
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise MediaError(f"frame {i} must be RGB uint8 (height, width, 3), not {image.dtype} {image.shape}")
        check_size(image.shape[1], image.shape[0], f"frame {i}")
        checked.append(image)
    if not checked:
        raise MediaError("there are no frames")
    count = len(checked)
    return Frames(checked, list(range(count)), [float(i) for i in range(count)], count, 1.0, float(count))
