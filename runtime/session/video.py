"""A Video: encoded once, asked many times. A question runs only the question tower, pooling and decoder."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import EngineError
from ppllava_edge.runtime.encoding.encoded_video import EncodedVideo
from ppllava_edge.runtime.language.prompt_lookup import PromptLookup
from ppllava_edge.runtime.language.sampling import Sampling
from ppllava_edge.runtime.language.text_processor import clean_question
from ppllava_edge.runtime.media.readers import Frames
from ppllava_edge.runtime.session.admission import Holder, Patience
from ppllava_edge.runtime.session.answer import (
    STAGES,
    Answer,
    GenerationOptions,
    Moment,
    attended_moments,
    record_elapsed,
)
from ppllava_edge.runtime.session.answer_stream import AnswerStream
from ppllava_edge.runtime.session.asynchronous import AsyncAnswerStream, finished
from ppllava_edge.runtime.session.chat import Chat
from ppllava_edge.runtime.session.context import Session
from ppllava_edge.runtime.session.prepared import PooledVideo, PreparedQuestion

KEEP = ("features", "tokens", "prefix")


class Video:
    """An encoded video that answers questions. Created by VideoQA.open and Live.video.

    Attributes:
        media: "video" or "image".
        features: (T, P, C), what the model sees; None if the question is to choose the frames.
        keep: As in VideoQA.open.
    """

    def __init__(self, qa: Session, encoded_video: EncodedVideo, keep: str = "features"):
        self.qa, self.encoded_video, self.keep = qa, encoded_video, keep
        self.features, self.media = encoded_video.features, encoded_video.media
        self._encoding_times = {
            "video_decode": encoded_video.video_decode,
            "vision": encoded_video.vision,
        }
        self._lock = threading.Lock()
        self._chat: Chat | None = None
        if keep != "features":
            self._chat = Chat(qa.pipeline, qa.text, keep == "tokens", qa.admission.max_waiting)
        qa.register(self)

    @property
    def frames(self) -> Frames:
        """The sampled frames (or those to choose from): numbers, times in seconds, notes, and small pictures
        as far as they are kept."""
        return self.encoded_video.frames()

    def pictures(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Frames by their number, as small pictures.

        Returns:
            RGB uint8 (H, W, 3), at most 448 pixels a side. The source is read again if they weren't kept.

        Raises:
            MediaError: If there is no such frame, or the source can't be read again.
        """
        return self.encoded_video.pictures_of(indices)

    def arrays(self) -> list[Any]:
        """The arrays that it holds: features, or candidates, and small pictures."""
        return self.encoded_video.arrays()

    def release(self, timeout: float | None) -> None:
        """The model is closed: release the chat's KV cache, at once or when its answer has ended."""
        if self._chat is not None:
            self._chat.release()

    # -- questions -------------------------------------------------------------------------------------------

    def ask(
        self,
        question: str,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        look_ahead: bool = False,
        timeout: float | None = None,
    ) -> Answer:
        """Answer one question.

        Args:
            question: The question in natural language.
            max_new_tokens: Maximum number of tokens in the answer.
            sampling: Temperature and the like; greedy by default.
            stop: A text that ends the answer, or several.
            look_ahead: Draft tokens from the prompt and verify several in a pass (prompt lookup).
            timeout: Seconds after which the answer ends, with the text so far. Noticed between calls of the
                engine (a pooling, the prefill, one token), none of which can be interrupted.

        Returns:
            The answer, with timings and token counts.

        Raises:
            PromptError: If the question is empty or too long.
            EngineError: If the engine fails or can't look ahead, or the model was closed.
            BusyError: If too many questions wait, this one was not admitted in time, or no slot is free and
                the calling thread has unfinished streams.
        """
        return self.stream(question, max_new_tokens, sampling, stop, look_ahead, timeout).exhaust()

    async def ask_async(
        self,
        question: str,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        look_ahead: bool = False,
        timeout: float | None = None,
    ) -> Answer:
        """`ask` for asyncio. Cancelling the task ends the answer within one token."""
        return await finished(self.stream(question, max_new_tokens, sampling, stop, look_ahead, timeout))

    def stream(
        self,
        question: str,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        look_ahead: bool = False,
        timeout: float | None = None,
    ) -> AnswerStream:
        """`ask`, as an iterator of text pieces; `answer` is set once it is exhausted or closed.

        `with video.stream(…) as stream:` closes it when it is left, whatever happens.
        """
        self.qa.check_usable()
        question = clean_question(question)
        options = GenerationOptions(max_new_tokens, sampling or Sampling(), stop, look_ahead, timeout)
        return AnswerStream(self.qa, self, question, options)

    def stream_async(
        self,
        question: str,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        look_ahead: bool = False,
        timeout: float | None = None,
    ) -> AsyncAnswerStream:
        """`stream` for asyncio: `async for piece in video.stream_async(…)`. Cancelling the task closes it."""
        return AsyncAnswerStream(self.stream(question, max_new_tokens, sampling, stop, look_ahead, timeout))

    def similarity(self, question: str) -> np.ndarray:
        """Cosine (T, rows, columns) float32 of every patch with the question.

        Raises:
            EngineError: If the model pools without the question.
        """
        return self.attention(question)[0]

    def attention(self, question: str) -> tuple[np.ndarray, np.ndarray, list[int], list[float]]:
        """Where a question attends.

        Returns:
            Cosine and pooling weights (T, rows, columns) of every patch, frame numbers, times (seconds).

        Raises:
            EngineError: If the model pools without the question.
        """
        self.qa.check_usable()
        pipeline, pooling = self.qa.pipeline, self.qa.pipeline.manifest.pooling
        if not pooling.guided:
            raise EngineError(
                f"{self.qa.name} pools without the question ({pooling.method}): it has no similarity"
            )
        self.qa.load("answering")
        ids, _ = self.qa.text.question_ids(clean_question(question))
        with self.qa.engine_lock.hold():
            q = pipeline.encode_question(ids)
            features, indices, times = self._view(q)
            weights = np.asarray(pipeline.window_weights(features, q))
            return pipeline.similarity(features, q), weights, indices, times

    # -- what an AnswerRun needs (session/prepared.py) -------------------------------------------------------

    def turn(self, patience: Patience, holder: Holder) -> AbstractContextManager[Any]:
        """Wait until the video takes a question: a chat's last answer has to end first. See Askable."""
        if self._chat is None:
            return nullcontext()
        return self._chat.take_turn(patience, holder, self.qa.admission.held_here())

    def prepare(
        self, question: str, options: GenerationOptions, timings: dict[str, float], patience: Patience
    ) -> PreparedQuestion:
        """Question tower, choice of frames and pooling. See Askable."""
        if self._chat is not None:
            pool = partial(self._pool, question, timings, patience)
            return self._chat.prepare(question, options, timings, pool)
        pipeline, pooled = self.qa.pipeline, self._pool(question, timings, patience)
        before, after = self.qa.text.prompt_pieces(question)

        def generate(lookup: PromptLookup | None) -> Generator[int, None, None]:
            prompt, stop_ids = pipeline.prompt(before, pooled.visual, after), pipeline.manifest.stop_ids
            return pipeline.generate(prompt, options.max_new_tokens, stop_ids, options.sampling, lookup)

        return PreparedQuestion(pooled, [*before, *after], generate)

    def _view(self, q: Any) -> tuple[Any, list[int], list[float]]:
        kernel = self.qa.pipeline.manifest.pooling.video.kernel
        return self.encoded_video.view(q, kernel[0] if kernel else 1)

    def _pool(self, question: str, timings: dict[str, float], patience: Patience) -> PooledVideo:
        """Pool the video under the guidance of the question; records the seconds of each stage."""
        qa, video, q, weights = self.qa, self.encoded_video, None, None
        pipeline, notes = qa.pipeline, list(video.notes)
        started = time.perf_counter()
        qa.load("answering")
        loading = time.perf_counter() - started
        with patience.hold(qa.engine_lock):
            at = time.perf_counter() - loading  # a first question's "question" includes opening its stages
            if pipeline.manifest.pooling.guided:
                ids, cut = qa.text.question_ids(question)
                q = pipeline.encode_question(ids)
                if cut:
                    notes.append(
                        "the question is longer than the question tower reads; "
                        "its end did not guide the pooling"
                    )
            at = record_elapsed(timings, "question", at)
            patience.check()
            features, indices, times = self._view(q)
            at = record_elapsed(timings, "select", at)
            patience.check()
            if video.media == "video" and q is not None:
                weights = pipeline.window_weights(features, q)
            visual = pipeline.visual_tokens(
                features, q, video.media, video.image_size, weights, video.windows
            )
            record_elapsed(timings, "pooling", at)

        def moments() -> list[Moment]:
            guided = weights is not None and len(times) > 1
            return attended_moments(np.asarray(weights), times) if guided else []

        return PooledVideo(visual, indices, times, moments, notes)

    def empty_answer(self, question: str, finish: str) -> Answer:
        """An answer that ended before its first token."""
        return Answer(
            question=question,
            text="",
            model=self.qa.name,
            finish=finish,
            frame_indices=[],
            frame_times=[],
            visual_tokens=0,
            text_tokens=0,
            new_tokens=0,
            timings=dict.fromkeys((*STAGES, "first_token", "generate"), 0.0),
            notes=list(self.encoded_video.notes),
            engine=self.qa.pipeline.engine_name,
        )

    def take_encoding_times(self) -> dict[str, float]:
        """Seconds of decoding and encoding, for the first question; zeros afterwards."""
        with self._lock:
            times, self._encoding_times = self._encoding_times, {"video_decode": 0.0, "vision": 0.0}
        return times
