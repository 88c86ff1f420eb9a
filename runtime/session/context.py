"""State that the videos and live views of one model share."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ppllava_edge.engines.errors import EngineError
from ppllava_edge.runtime.language.text_processor import TextProcessor
from ppllava_edge.runtime.pipeline.base import BasePipeline
from ppllava_edge.runtime.pipeline.memory import Memory, is_mapped
from ppllava_edge.runtime.session.admission import FairSemaphore
from ppllava_edge.runtime.session.callbacks import call_app

log = logging.getLogger(__name__)
EXIT_GRACE = 2.0  # seconds to wait for the threads of each live view when the interpreter exits
MAX_LATE = 1024  # events of abandoned streams that wait to be reported
# The event ("open", "answer", "frame", "live") and its figures, in seconds unless stated otherwise.
Metrics = Callable[[str, dict[str, Any]], None]
S = TypeVar("S", bound="Session")


class Dependent(Protocol):
    """A video or a live view, which holds features and caches of a model."""

    def arrays(self) -> Iterable[Any]:
        """The arrays that it holds: numpy's or device buffers."""

    def release(self, timeout: float | None) -> None:
        """The model is closed: end what is under way, and release the KV caches.

        Args:
            timeout: Seconds to wait for threads at most; None: as long as it takes.
        """


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
        self._dependents: weakref.WeakSet[Dependent] = weakref.WeakSet()
        # Re-entrant: a destructor may come here in any thread, and what it calls too.
        self._life = threading.RLock()
        _sessions.add(self)

    # -- life ------------------------------------------------------------------------------------------------

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
        self.check_process()

    @property
    def forked(self) -> bool:
        """Whether this is a forked child of the process that loaded the model."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Raise EngineError in a forked child, where other threads may have held our locks for ever."""
        if self.forked:
            raise EngineError(
                "the VideoQA was loaded before this process was forked, and an engine's threads don't "
                "survive a fork: create the VideoQA in the child, or start children with spawn"
            )

    def register(self, dependent: Dependent) -> None:
        """Remember a video or a live view, without keeping it alive, for `close` and `memory`.

        Raises:
            EngineError: If the model is closed.
        """
        with self._life:
            self.check_usable()
            self._dependents.add(dependent)

    def load(self, what: str = "all") -> None:
        """Open stages and tokenizers that aren't open yet. Call this before taking the engine lock.

        Args:
            what: "encoding", "answering" or "all", as BasePipeline.load takes it.

        Raises:
            BundleError, EngineError: If one can't be opened.
        """
        self.pipeline.load(what)
        if what != "encoding":
            _ = self.text.tokenizer
            if self.pipeline.manifest.pooling.guided:
                _ = self.text.question_tokenizer

    def memory(self) -> Memory:
        """What the model, its caches and its videos hold, in bytes."""
        self.check_process()
        with self._life:
            arrays = [array for dependent in self._dependents for array in dependent.arrays()]
        distinct = {id(array): array for array in arrays}.values()
        mapped = sum(array.nbytes for array in distinct if is_mapped(array))
        return Memory(
            weights=self.pipeline.weights_bytes(),
            caches=self.pipeline.cache_bytes(),
            features=sum(array.nbytes for array in distinct) - mapped,
            mapped=mapped,
        )

    def close(self) -> None:
        """Close the model: answers under way end within one token, and further use raises EngineError.

        Answers end with finish "cancelled", questions that wait for admission raise EngineError, live views
        and their watches are closed. Engines, KV caches and mapped weights are released when the last call
        under way has ended (a stream that the app keeps unfinished: when it takes the next piece or drops the
        stream); features when the app drops its videos. Safe from any thread, from callbacks, and twice.
        """
        self._close(None)

    def _close(self, timeout: float | None) -> None:
        """`close`, waiting for the threads of each live view for `timeout` seconds at most."""
        if self.forked:  # other threads may have held these locks for ever
            self._closed = True
            return
        with self._life:
            if self._closed:
                return
            self._closed = True
            dependents = list(self._dependents)
        _sessions.discard(self)
        try:
            for dependent in dependents:
                try:
                    dependent.release(timeout)
                except Exception:
                    log.exception("a video or a live view could not be closed")
        finally:  # also after Ctrl-C, while it waits for a thread
            self.pipeline.close()
            self.text.close()

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- facts and reports -----------------------------------------------------------------------------------

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
            call_app("metrics", self._metrics, event, figures)


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close what the app left open: its threads must not run while the interpreter is taken down.

    A callback that never returns, because it waits for the main thread, must not keep the process.
    """
    for session in list(_sessions):
        session._close(EXIT_GRACE)
