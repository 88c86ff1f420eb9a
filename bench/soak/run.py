"""Runs the soak: threads or tasks that ask, then a look at what is left over."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppllava_edge.bench.soak.questions import AsyncQuestions, ThreadQuestions
from ppllava_edge.bench.soak.workload import Workload
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.machine.memory import resident_memory

SETTLED = 0.2  # share of the questions after which memory must not grow any more
STUCK_SECONDS = 300  # without a question that ends
TASKS = 32  # asyncio's questions at once
SAMPLES = 50


def soak(questions: int, threads: int, parallel: int, seed: int, use_asyncio: bool = False) -> dict[str, Any]:
    """Ask `questions` questions at random, of which many are cancelled, abandoned or too late.

    Args:
        questions: How many.
        threads: Threads that ask.
        parallel: As VideoQA takes it.
        seed: Of everything random.
        use_asyncio: Ask from tasks of one event loop instead of threads.

    Returns:
        "questions", "ended" (how → count), "watched": counts. "seconds". "wrong": lines; none if all is well.
        "left": slots, waiting threads, locks and turns still held, and threads and files still open.
        "memory": VideoQA.memory() at the end. "rss": bytes, sampled. "growth": bytes by which it grew after a
        fifth of the questions.

    Raises:
        PPLLaVAError: If no question ended for 300 s; all threads' stacks are on stderr then.
    """
    _warm_libraries(parallel)
    threads_before, files_before = threading.active_count(), _open_files()
    with tempfile.TemporaryDirectory(prefix="ppllava-soak-") as folder:
        workload = Workload(Path(folder), parallel, seed)
        progress = Progress(questions)
        started = time.perf_counter()
        (_ask_from_tasks if use_asyncio else _ask_from_threads)(workload, progress, threads, seed)
        seconds = time.perf_counter() - started
        workload.stop()
        gc.collect()
        left, memory = workload.leftovers(), workload.qa.memory().as_dict()
        workload.qa.close()
    wrong, watched = workload.wrong, workload.watched
    del workload
    gc.collect()
    left["files"] = max(_open_files() - files_before, 0)
    left["threads"] = max(_threads_of_ours() - threads_before, 0)
    return {
        "questions": questions,
        "seconds": seconds,
        "ended": dict(progress.ended.most_common()),
        "watched": watched,
        "wrong": wrong,
        "left": left,
        "memory": memory,
        "rss": progress.memory,
        "growth": progress.growth(),
    }


class Progress:
    """Hands out questions to the threads, and counts how they ended. Thread-safe.

    Args:
        questions: How many to hand out.

    Attributes:
        ended: How → count.
        memory: Resident bytes, sampled.
    """

    def __init__(self, questions: int):
        self.questions = questions
        self.ended: Counter[str] = Counter()
        self.memory: list[int] = []
        self._handed_out = 0
        self._lock = threading.Lock()

    def next(self) -> bool:
        """Whether there is another question to ask."""
        with self._lock:
            if self._handed_out % max(self.questions // SAMPLES, 1) == 0:
                self.memory.append(resident_memory())
            self._handed_out += 1
            return self._handed_out <= self.questions

    def count(self, how: str) -> None:
        """Count a question that ended."""
        with self._lock:
            self.ended[how] += 1

    def growth(self) -> int:
        """Bytes from the largest sample around the first fifth's end to the last ones' median."""
        settled = max(1, int(SETTLED * len(self.memory)))
        last = sorted(self.memory[-5:])
        return last[len(last) // 2] - max(self.memory[: settled + 1])


def _ask_from_threads(workload: Workload, progress: Progress, threads: int, seed: int) -> None:
    asking = ThreadQuestions(workload)

    def work(rng: random.Random) -> None:
        while progress.next():
            try:
                progress.count(asking.ask(rng))
            except Exception as error:
                workload.note(f"{type(error).__name__}: {error}")
                progress.count("error")

    workers = [
        threading.Thread(target=work, args=(random.Random(seed + i),), name=f"soak-{i}", daemon=True)
        for i in range(threads)
    ]
    for worker in workers:
        worker.start()
    _wait(progress, lambda: not any(worker.is_alive() for worker in workers))
    asking.stop()


def _wait(progress: Progress, is_done: Callable[[], bool]) -> None:
    """Wait for the end. Raises PPLLaVAError if nothing happens."""
    ended, since = -1, time.monotonic()
    while not is_done():
        time.sleep(0.05)
        now = progress.ended.total()
        if now != ended:
            ended, since = now, time.monotonic()
        elif time.monotonic() - since > STUCK_SECONDS:
            faulthandler.dump_traceback(all_threads=True)
            raise PPLLaVAError(f"no question ended for {STUCK_SECONDS} s, after {now} of them")


def _ask_from_tasks(workload: Workload, progress: Progress, threads: int, seed: int) -> None:
    asking = AsyncQuestions(workload)

    async def work(rng: random.Random) -> None:
        while progress.next():
            try:
                progress.count(await asking.ask(rng))
            except Exception as error:
                workload.note(f"{type(error).__name__}: {error}")
                progress.count("error")

    async def work_together() -> None:
        await asyncio.gather(*(work(random.Random(seed + i)) for i in range(TASKS)))

    loop = threading.Thread(target=lambda: asyncio.run(work_together()), name="soak-loop", daemon=True)
    loop.start()
    _wait(progress, lambda: not loop.is_alive())


def _warm_libraries(parallel: int) -> None:
    """Open what libraries keep open for good: it is no leak of ours."""
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(Path(folder), parallel, 0)
        workload.stop()
        workload.qa.close()
    gc.collect()


def _threads_of_ours() -> int:
    """Threads that run, but for the executor's of ask_async, which are kept."""
    return sum(not thread.name.startswith("ppllava-async") for thread in threading.enumerate())


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
