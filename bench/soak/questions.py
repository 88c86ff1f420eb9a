"""How the soak asks: questions that are finished, cancelled, abandoned or late, by threads or asyncio."""

from __future__ import annotations

import asyncio
import gc
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from ppllava_edge.bench.concurrency import QUESTIONS
from ppllava_edge.bench.soak.workload import MAX_NEW_TOKENS, Workload
from ppllava_edge.engines.errors import BusyError
from ppllava_edge.runtime.session.answer_stream import AnswerStream

LONGEST_TIMEOUT = 0.1  # seconds
Asks = Callable[[random.Random], str]  # returns how the question ended


class ThreadQuestions:
    """Questions of threads, of all kinds.

    Args:
        workload: The model and its videos.
    """

    def __init__(self, workload: Workload):
        self.workload = workload
        self._kinds: dict[Asks, float] = {  # and how often each is asked
            self._plain: 50,
            self._live: 8,
            self._chat: 8,
            self._timeout: 8,
            self._cancel: 8,
            self._cancel_from_another_thread: 8,
            self._abandon: 8,
            self._abandon_in_a_cycle: 0.5,
            workload.open_broken: 2,
            self._open_again: 0.5,
            self._script: 0.5,
        }
        self._closing: queue.SimpleQueue[tuple[AnswerStream, float] | None] = queue.SimpleQueue()
        self._closer = threading.Thread(target=self._close_streams, name="soak-closer", daemon=True)
        self._closer.start()

    def ask(self, rng: random.Random) -> str:
        """Ask one question of a random kind. Returns how it ended."""
        (kind,) = rng.choices(list(self._kinds), list(self._kinds.values()))
        try:
            return kind(rng)
        except BusyError:
            return "busy"

    def stop(self) -> None:
        """Stop the thread that closes streams."""
        self._closing.put(None)
        self._closer.join()

    def _begin(self, rng: random.Random, **options: Any) -> tuple[str, str, AnswerStream]:
        """Start a question about a random video: its name, the question, the stream."""
        name, question = rng.choice(list(self.workload.videos)), rng.choice(QUESTIONS)
        stream = self.workload.videos[name].stream(question, MAX_NEW_TOKENS, **options)
        return name, question, stream

    def _plain(self, rng: random.Random) -> str:
        name, question, stream = self._begin(rng)
        return self.workload.check(name, question, stream.exhaust())

    def _live(self, rng: random.Random) -> str:
        question = rng.choice(QUESTIONS)
        return self.workload.check(
            "live", question, self.workload.live.ask(question, max_new_tokens=MAX_NEW_TOKENS)
        )

    def _chat(self, rng: random.Random) -> str:
        question = rng.choice(QUESTIONS)
        stream = self.workload.chat.stream(question, MAX_NEW_TOKENS, timeout=rng.choice([None, 1.0]))
        if rng.random() < 0.2:
            next(stream, None)
            stream.close()
        return self.workload.check("chat", question, stream.exhaust())

    def _timeout(self, rng: random.Random) -> str:
        name, question, stream = self._begin(rng, timeout=rng.uniform(1e-4, LONGEST_TIMEOUT))
        return self.workload.check(name, question, stream.exhaust())

    def _cancel(self, rng: random.Random) -> str:
        name, question, stream = self._begin(rng)
        with stream:
            for _ in range(rng.randrange(4)):
                next(stream, None)
        return self.workload.check(name, question, stream.answer)

    def _cancel_from_another_thread(self, rng: random.Random) -> str:
        name, question, stream = self._begin(rng)
        self._closing.put((stream, rng.uniform(0, 0.02)))
        return self.workload.check(name, question, stream.exhaust())

    def _close_streams(self) -> None:
        while (item := self._closing.get()) is not None:
            stream, seconds = item
            time.sleep(seconds)
            stream.close()
            del stream, item

    def _abandon(self, rng: random.Random) -> str:
        _, _, stream = self._begin(rng)
        next(stream, None)
        return "abandoned"

    def _abandon_in_a_cycle(self, rng: random.Random) -> str:
        """Only the garbage collector finds this stream; it runs in whichever thread comes next."""
        _, _, stream = self._begin(rng)
        next(stream, None)
        cycle: list[Any] = [stream]
        cycle.append(cycle)
        del stream, cycle
        gc.collect()
        return "abandoned"

    def _open_again(self, rng: random.Random) -> str:
        name, video = self.workload.open_again(rng)
        question = rng.choice(QUESTIONS)
        return self.workload.check(name, question, video.ask(question, MAX_NEW_TOKENS))

    def _script(self, rng: random.Random) -> str:
        return self.workload.follow_script()


class AsyncQuestions:
    """Questions of asyncio tasks.

    Args:
        workload: The model and its videos.
    """

    def __init__(self, workload: Workload):
        self.workload = workload

    async def ask(self, rng: random.Random) -> str:
        """Ask one question, and cancel it or let it time out now and then. Returns how it ended."""
        workload = self.workload
        name, question = rng.choice([*workload.videos, "live", "chat"]), rng.choice(QUESTIONS)
        asked: dict[str, Any] = {"live": workload.live, "chat": workload.chat, **workload.videos}
        timeout = rng.uniform(1e-4, LONGEST_TIMEOUT) if rng.random() < 0.15 else None
        asking = asked[name].ask_async(question, max_new_tokens=MAX_NEW_TOKENS, timeout=timeout)
        patience = rng.uniform(0, LONGEST_TIMEOUT) if rng.random() < 0.3 else None
        try:
            answer = await asyncio.wait_for(asking, patience)
        except asyncio.TimeoutError:
            return "cancelled"
        except BusyError:
            return "busy"
        return workload.check(name, question, answer)
