"""What people embed: a VideoQA opens videos, a Video answers questions.

A video is decoded and encoded once, when it is opened. Only pooling depends on the question, so every question after the first costs the
question tower, pooling and the decoder.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.errors import BusyError, EngineError, MediaError, PromptError
from ..engines.pooling import Windows
from ..engines.prompt_template import PromptTemplate
from .answer import STAGES, Answer, AnswerStream, Asking, Moment, Pooled, Prepared, attended_moments, lap
from .asynchronous import finished
from .conversation import Conversation
from .feature_cache import CachedVideo, FeatureCache, bundle_hash, content_hash
from .looking import DEFAULT_CANDIDATES, Look, Looked, Progress, look_at, read_pictures, reader_of
from .lookup import Lookup
from .pipeline import Pipeline
from .sampling import Sampling
from .scheduling import Turns
from .selection import Candidates
from .text import TextSide, clean_question
from .video import Frames, open_reader

if TYPE_CHECKING:
    from .live import Live

log = logging.getLogger(__name__)
KEEP = ("features", "tokens", "prefix")
Metrics = Callable[[str, dict[str, Any]], None]  # what happened ("open", "answer", "frame", "live"), figures; seconds where not said otherwise


class VideoQA:
    """A model that answers questions about videos.

    bundle: a directory that ppllava-export wrote; None: the packed demonstration model, nano. device: auto | cpu | cuda. threads: of the
    engine. template: a prompt template's name instead of the bundle's own. engine: auto (the fastest that is built and fits), onnxruntime,
    tensorrt, rtx, standard, or a target that ppllava-build built. cache: keeps encoded videos on disk: True, a folder, or a FeatureCache.
    parallel: answers under way at once, each with a KV cache of its own; queue: how many more may wait (the next raises BusyError).
    metrics: called with ("open" | "answer" | "frame" | "live", figures) from whichever thread it happened in; keep it short.
    Raises BundleError or EngineError in one line. Safe to use from several threads.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | None = None,
        device: str = "auto",
        threads: int | None = None,
        template: str | PromptTemplate | None = None,
        engine: str = "auto",
        cache: bool | str | os.PathLike[str] | FeatureCache = False,
        parallel: int = 4,
        queue: int = 64,
        metrics: Metrics | None = None,
    ):
        if bundle is None:
            from ..nano import bundle_path

            bundle = bundle_path()
        if parallel < 1 or queue < 0:
            raise EngineError(f"parallel must be 1 or more and queue 0 or more, not {parallel} and {queue}")
        self.pipeline = Pipeline.open(bundle, device, threads, engine)
        self.text = TextSide(self.pipeline.bundle, template)
        self.cache = cache if isinstance(cache, FeatureCache) else FeatureCache(None if cache is True else cache) if cache else None
        self.places, self.turns = Turns(parallel, queue, "questions", own_first=True), Turns()
        self._metrics = metrics

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
        frames: int | str | None = None,
        start: float | None = None,
        end: float | None = None,
        progress: Progress | None = None,
        *,
        tokens: int | None = None,
        select: str = "uniform",
        candidates: int = DEFAULT_CANDIDATES,
        keep: str = "features",
    ) -> Video:
        """Decode and encode a video once.

        source: a video file, an image, an animation, a folder of images, or a sequence of RGB uint8 frames (H,W,3), all of which are used
        (frames must be None then). frames: how many the model sees, default the model's; "auto": more for longer videos. start, end: seconds.
        tokens: most visual tokens. select: "uniform", or "guided": of `candidates` frames the question picks those that are pooled.
        keep: "features": every question pools anew; "tokens": a chat, further questions reuse the first one's visual tokens and KV cache;
        "prefix": the same, but the model doesn't see the turns before.
        progress: called with ("decode" | "vision", done, of how many). Raises MediaError in one line.
        """
        look = Look(frames, start, end, tokens, select, candidates)
        if keep not in KEEP:
            raise MediaError(f"keep must be {', '.join(KEEP)}, not {keep!r}")
        key = self._cache_key(source, look)
        looked, cached, began = self._cached(key, source), True, time.perf_counter()
        if looked is None:
            looked, cached = look_at(self.pipeline, self.turns, reader_of(source, look), look, progress), False
            looked.video_decode = time.perf_counter() - began - looked.vision  # everything but encoding is waiting for frames
            self._remember(key, looked)
        self.report("open", {"video_decode": looked.video_decode, "vision": looked.vision, "frames": len(looked.indices), "cached": cached})
        return Video(self, looked, keep)

    def live(
        self,
        source: str | os.PathLike[str] | None = None,
        fps: float = 2.0,
        window: int = 64,
        *,
        history: float | None = 3600.0,
        realtime: bool = True,
        reconnect: bool = True,
        timeout: float = 10.0,
        format: str | None = None,
        options: Mapping[str, str] | None = None,
        on_state: Callable[[str, str], None] | None = None,
    ) -> Live:
        """Watch a camera, a stream, a file in real time, or (source None) frames that the app pushes; ask at any moment. Arguments: see Live."""
        from .live import Live

        return Live(self, source, fps, window, history=history, realtime=realtime, reconnect=reconnect, timeout=timeout, format=format,
                    options=options, on_state=on_state)  # fmt: skip

    def report(self, event: str, figures: dict[str, Any]) -> None:
        """Tell the app's metrics callback and the log. A callback that fails is logged, not raised."""
        log.debug("%s %s", event, figures)
        if self._metrics is not None:
            try:
                self._metrics(event, figures)
            except Exception:
                log.exception("the metrics callback failed")

    # -- cached features -------------------------------------------------------------------------------------------------------------------

    def _cache_key(self, source: Any, look: Look) -> tuple[object, ...] | None:
        if self.cache is None or not isinstance(source, (str, os.PathLike)) or not (os.path.isfile(source) or os.path.isdir(source)):
            return None  # what isn't there, or is no file, is for the reader to say
        p = self.pipeline
        return content_hash(source), bundle_hash(p.bundle), p.engine_name, repr(p.engine.made_by if p.engine else ""), repr(look)

    def _cached(self, key: tuple[object, ...] | None, source: Any) -> Looked | None:
        started = time.perf_counter()
        found = self.cache.load(*key) if self.cache is not None and key is not None else None
        if found is None:
            return None
        try:
            looked = Looked(**found.facts)
            if "states" in found.arrays:
                looked.candidates = Candidates(self.pipeline, found.arrays["states"], found.arrays["features"])
            else:
                looked.features = found.arrays["features"]
        except (TypeError, KeyError):  # written by another version
            return None
        looked.windows = Windows.from_json(found.facts["windows"]) if found.facts.get("windows") else None
        looked.image_size = (looked.image_size[0], looked.image_size[1]) if looked.image_size else None
        looked.read_again = lambda indices: read_pictures(open_reader(source), indices)
        log.info("features of %s came from the cache in %.3f s", source, time.perf_counter() - started)
        return looked

    def _remember(self, key: tuple[object, ...] | None, looked: Looked) -> None:
        if self.cache is None or key is None:
            return
        arrays = {"features": np.asarray(looked.features)} if looked.candidates is None else {}
        if looked.candidates is not None:
            arrays = {"states": looked.candidates.states, "features": looked.candidates.features}
        names = ("kind", "media", "indices", "times", "fps", "duration", "source_frames", "count", "image_size", "notes")
        facts = {name: getattr(looked, name) for name in names} | {"windows": looked.windows.as_json() if looked.windows else None}
        self.cache.store(CachedVideo(arrays, facts), *key)


class Video:
    """An encoded video, before any question.

    media: "video" or "image". features (T,P,C): what the model saw; None if the question is to pick the frames. keep: as in VideoQA.open.
    """

    def __init__(self, qa: VideoQA, looked: Looked, keep: str = "features"):
        self.qa, self.looked, self.keep = qa, looked, keep
        self.features, self.media = looked.features, looked.media
        self._unspent = {"video_decode": looked.video_decode, "vision": looked.vision}
        self._lock = threading.Lock()
        self._conversation = Conversation(qa.pipeline, qa.text, keep == "tokens") if keep != "features" else None

    @property
    def frames(self) -> Frames:
        """The frames that were looked at (or are to be chosen from): indices, times (seconds), notes, and small pictures as far as they are kept."""
        seen = self.looked
        images = [seen.pictures[i] for i in seen.indices if i in seen.pictures]
        return Frames(images, list(seen.indices), list(seen.times), seen.source_frames, seen.fps, seen.duration, seen.kind, list(seen.notes))

    def pictures(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Frames as RGB uint8 (H,W,3), at most 448 pixels a side, by their index. Reads the source again if they weren't kept; raises MediaError."""
        return self.looked.pictures_of(indices)

    def ask(
        self,
        question: str,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        look_ahead: bool = False,
        timeout: float | None = None,
    ) -> Answer:
        """Answer one question. stop: texts that end the answer. look_ahead: verify several guessed tokens in a pass (runtime/lookup.py). timeout: seconds
        after which the answer ends as it is.

        Raises PromptError for an empty question or one too long, EngineError if the engine can't look ahead, BusyError if too many wait.
        """
        stream = self.stream(question, max_new_tokens, sampling, stop, look_ahead, timeout)
        for _ in stream:
            pass
        return stream.answer

    async def ask_async(
        self, question: str, max_new_tokens: int = 256, sampling: Sampling | None = None, stop: Sequence[str] = (), timeout: float | None = None
    ) -> Answer:
        """The same for asyncio: the loop goes on meanwhile. Cancelling the task ends the answer within one token."""
        return await finished(self.stream(question, max_new_tokens, sampling, stop, timeout=timeout))

    def stream(
        self,
        question: str,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        look_ahead: bool = False,
        timeout: float | None = None,
    ) -> AnswerStream:
        """The same, as an iterator of pieces of text; its .answer is there when it is exhausted or closed."""
        return AnswerStream(self, clean_question(question), Asking(max_new_tokens, sampling or Sampling(), tuple(stop), look_ahead, timeout))

    def similarity(self, question: str) -> np.ndarray:
        """Cosine (T,rows,columns) float32 of every patch with the question. Raises EngineError if the model pools without the question."""
        return self.attention(question)[0]

    def attention(self, question: str) -> tuple[np.ndarray, np.ndarray, list[int], list[float]]:
        """What a question looks at: cosine and pooling weights (T,rows,columns) of every patch, the frames' indices and times (seconds)."""
        pipeline = self.qa.pipeline
        if not pipeline.manifest.pooling.guided:
            raise EngineError(f"{self.qa.name} pools without the question ({pipeline.manifest.pooling.method}): it has no similarity")
        ids, _ = self.qa.text.question_ids(clean_question(question))
        with self.qa.turns:
            q = pipeline.encode_question(ids)
            features, indices, times = self._view(q)
            return pipeline.similarity(features, q), np.asarray(pipeline.window_weights(features, q)), indices, times

    # -- what an answer is made of (runtime/answer.py) -----------------------------------------------------------------------------------------

    def _view(self, q: Any) -> tuple[Any, list[int], list[float]]:
        """Features, indices and times of the frames that this question is answered from."""
        seen = self.looked
        if seen.candidates is None:
            return seen.features, seen.indices, seen.times
        pooling = self.qa.pipeline.manifest.pooling
        features, chosen = seen.candidates.choose(q, seen.count, pooling.video.kernel[0] if pooling.video.kernel else 1)
        return features, [seen.indices[i] for i in chosen], [seen.times[i] for i in chosen]

    def prepare(
        self, question: str, asking: Asking, timings: dict[str, float], deadline: float | None, given_up: Callable[[], bool]
    ) -> Prepared | None:
        """Question tower, choice of frames and pooling; notes their seconds. A chat waits for its last answer until the deadline (time.monotonic());
        None if it was given up. Raises PromptError for a prompt that is too long, BusyError at the deadline."""
        if self._conversation is not None:
            return self._prepare_turn(self._conversation, question, asking, timings, deadline, given_up)
        pipeline, pooled = self.qa.pipeline, self._pool(question, timings)
        before, after = self.qa.text.prompt_pieces(question)

        def generate(lookup: Lookup | None) -> Generator[int, None, None]:
            prompt = pipeline.prompt(before, pooled.visual, after)
            return pipeline.generate(prompt, asking.max_new_tokens, pipeline.manifest.stop_ids, asking.sampling, lookup)

        return Prepared(pooled, [*before, *after], generate)

    def _pool(self, question: str, timings: dict[str, float]) -> Pooled:
        qa, seen, q, weights = self.qa, self.looked, None, None
        pipeline, notes = qa.pipeline, list(seen.notes)
        with qa.turns:
            at = time.perf_counter()
            if pipeline.manifest.pooling.guided:
                ids, cut = qa.text.question_ids(question)
                q = pipeline.encode_question(ids)
                if cut:
                    notes.append("the question is longer than the question tower reads; its end did not guide the pooling")
            at = lap(timings, "question", at)
            features, indices, times = self._view(q)
            at = lap(timings, "select", at)
            if seen.media == "video" and q is not None:
                weights = pipeline.window_weights(features, q)
            visual = pipeline.visual_tokens(features, q, seen.media, seen.image_size, weights, seen.windows)
            lap(timings, "pooling", at)

        def moments() -> list[Moment]:
            return attended_moments(np.asarray(weights), times) if weights is not None and len(times) > 1 else []

        return Pooled(visual, indices, times, moments, notes)

    def _prepare_turn(
        self,
        conversation: Conversation,
        question: str,
        asking: Asking,
        timings: dict[str, float],
        deadline: float | None,
        given_up: Callable[[], bool],
    ) -> Prepared | None:
        """A turn of a chat: the first is pooled, the others go on from the cache."""
        if asking.look_ahead:
            raise EngineError('looking ahead and keep="tokens" or "prefix" don\'t go together')
        if conversation.turn.held_here():
            raise PromptError("the chat's last answer is not finished: exhaust its stream, or close it, first")
        if not conversation.turn.acquire(deadline, given_up):
            if given_up():
                return None
            raise BusyError(f"the chat's last question was still being answered after {asking.timeout:g} s")
        me = threading.get_ident()
        try:
            if conversation.pooled is not None:
                timings |= {"question": 0.0, "select": 0.0, "pooling": 0.0}
                pooled = replace(conversation.pooled, moments=list)  # where this question would look was not asked
                text_ids = new_ids = conversation.next_ids(question)
            else:
                pooled = self._pool(question, timings)
                before, new_ids = self.qa.text.prompt_pieces(question)
                conversation.begin(pooled, before)
                text_ids = [*before, *new_ids]
        except BaseException:
            conversation.turn.release()
            raise
        stop_ids = self.qa.pipeline.manifest.stop_ids
        return Prepared(pooled, text_ids, lambda lookup: conversation.generate(new_ids, asking, stop_ids), lambda answer: conversation.turn.release(me))

    def empty_answer(self, question: str, finish: str) -> Answer:
        """What a question gets that was given up while it waited."""
        timings = dict.fromkeys((*STAGES, "first_token", "generate"), 0.0)
        return Answer(question, "", self.qa.name, finish, [], [], 0, 0, 0, timings, list(self.looked.notes), self.qa.pipeline.engine_name)

    def take_unspent(self) -> dict[str, float]:
        """Seconds of decoding and encoding, for whoever asks first; zeros afterwards."""
        with self._lock:
            unspent, self._unspent = self._unspent, {"video_decode": 0.0, "vision": 0.0}
        return unspent
