"""State that the videos and live views of one model share."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable
from typing import Any

from ppllava_edge.engines.errors import EngineError
from ppllava_edge.runtime.language.text_processor import TextProcessor
from ppllava_edge.runtime.pipeline.base import BasePipeline
from ppllava_edge.runtime.session.admission import FairSemaphore

log = logging.getLogger(__name__)
MAX_LATE = 1024  # events of abandoned streams that wait to be reported
# The event ("open", "answer", "frame", "live") and its figures, in seconds unless stated otherwise.
Metrics = Callable[[str, dict[str, Any]], None]


class Session:
    """One model's pipeline and text processing, and the two queues in front of them.

    Args:
        pipeline: The opened model.
        text: Its tokenizers and prompt template.
        parallel: Answers that may be active at once, each with a KV cache of its own.
        queue: How many more may wait; the next raises BusyError.
        metrics: Called with the event and its figures, in the thread where it happened.

    Attributes:
        admission: Held by a question from its admission to its last token.
        engine_lock: Held for one call of the engine: a batch of frames, a pooling, one token.
    """

    def __init__(
        self,
        pipeline: BasePipeline,
        text: TextProcessor,
        parallel: int = 4,
        queue: int = 64,
        metrics: Metrics | None = None,
    ):
        self.pipeline, self.text = pipeline, text
        self.admission = FairSemaphore(
            parallel,
            queue,
            "questions",
            unfinished="answer",
            advice="exhaust or close its streams first, or use `with video.stream(…) as stream:`",
        )
        self.engine_lock = FairSemaphore()
        self._metrics = metrics
        self._late: deque[tuple[str, dict[str, Any]]] = deque(maxlen=MAX_LATE)
        self._process = os.getpid()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the model was closed: answers under way end, further use raises EngineError."""
        return self._closed

    def check_usable(self) -> None:
        """Check that the model can be used. Every method that needs the engine calls this first.

        Raises:
            EngineError: If the model was closed, or loaded before this process was forked: a forked child
                has the engine's memory, but not its threads, so it would wait for them for ever.
        """
        if self._closed:
            raise EngineError("the VideoQA is closed; create another one")
        if os.getpid() != self._process:
            raise EngineError(
                "the VideoQA was loaded before this process was forked, and an engine's threads don't survive "
                "a fork: create the VideoQA in the child, or start children with spawn"
            )

    @property
    def name(self) -> str:
        """The model's name."""
        return self.pipeline.manifest.name

    @property
    def is_demo(self) -> bool:
        """Whether this is a demonstration model."""
        return self.pipeline.manifest.demo

    def report(self, event: str, figures: dict[str, Any]) -> None:
        """Tell the app's metrics callback and the log. A callback that fails is logged, not raised."""
        while self._late:
            with contextlib.suppress(IndexError):  # another thread took it
                self._tell(*self._late.popleft())
        self._tell(event, figures)

    def report_later(self, event: str, figures: dict[str, Any]) -> None:
        """`report`, together with the next event. For destructors, which run at any point of any thread."""
        self._late.append((event, figures))

    def _tell(self, event: str, figures: dict[str, Any]) -> None:
        log.debug("%s %s", event, figures)
        if self._metrics is not None:
            try:
                self._metrics(event, figures)
            except Exception:
                log.exception("the metrics callback failed")
