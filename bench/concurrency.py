"""Many questions at once on one engine: same answers as one after another, how fast, and how soon a cancelled answer ends.

python -m ppllava_edge.bench.concurrency --threads 8 --questions 50
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import click
import numpy as np

from ppllava_edge.engines.terminal import Command, table
from ppllava_edge.nano import sample_path

QUESTIONS = (
    "What color is the circle?",
    "Describe the video.",
    "How many objects are there?",
    "Where is the blue square?",
    "Is there a red circle?",
)


def measure(threads: int, questions: int, cancels: int, model: str | None, video: str) -> dict[str, Any]:
    """Serial and concurrent seconds for threads × questions, wrong answers, spread of the threads' finishing times, cancel latencies (seconds)."""
    from ppllava_edge.runtime.video_qa import VideoQA

    qa = VideoQA(model, device="cpu")
    videos = [qa.open(video), qa.open(video, end=1.0)]
    want = {(i, q): v.ask(q).text for i, v in enumerate(videos) for q in QUESTIONS}
    plans = [
        [((t + n) % 2, QUESTIONS[(3 * t + n) % len(QUESTIONS)]) for n in range(questions)]
        for t in range(threads)
    ]
    wrong, ended = list[tuple[int, str]](), list[float]()

    def work(plan: list[tuple[int, str]]) -> None:
        wrong.extend((i, q) for i, q in plan if videos[i].ask(q).text != want[i, q])
        ended.append(time.perf_counter())

    began = time.perf_counter()
    for plan in plans:
        work(plan)
    serial, wrong_serial = time.perf_counter() - began, len(wrong)
    ended.clear()
    began = time.perf_counter()
    workers = [threading.Thread(target=work, args=(plan,)) for plan in plans]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    finished = [t - began for t in ended]
    return {
        "threads": threads,
        "questions": questions,
        "serial": serial,
        "concurrent": max(finished),
        "first_thread": min(finished),
        "wrong": len(wrong) - wrong_serial,
        "cancel": [_cancel(videos[0]) for _ in range(cancels)],
    }


def _cancel(video: Any) -> float:
    """Seconds from close() in one thread until the stream ended in another."""
    stream, begun, over = video.stream("Describe the video."), threading.Event(), list[float]()

    def read() -> None:
        for _ in stream:
            begun.set()
        over.append(time.perf_counter())

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    closed = time.perf_counter()
    stream.close()
    reader.join()
    return max(over[0] - closed, 0.0)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--threads", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option(
    "--questions", type=click.IntRange(1, 100000), default=50, show_default=True, help="Of every thread."
)
@click.option("--cancels", type=click.IntRange(1, 10000), default=50, show_default=True)
@click.option("--model", metavar="BUNDLE")
@click.option("--video", type=click.Path(exists=True))
@click.option("--json", "as_json", is_flag=True)
def main(
    threads: int, questions: int, cancels: int, model: str | None, video: str | None, as_json: bool
) -> None:
    """Ask from many threads, compare with asking one after another."""
    found = measure(threads, questions, cancels, model, video or str(sample_path()))
    if as_json:
        print(json.dumps(found))
        return
    cancel = [1000 * seconds for seconds in found["cancel"]]
    rows = [
        ("one after another, s", f"{found['serial']:.2f}"),
        ("at once, s", f"{found['concurrent']:.2f}"),
        ("first thread done after, s", f"{found['first_thread']:.2f}"),
        ("answers that differ", found["wrong"]),
        ("cancelled within, ms: median, most", f"{np.median(cancel):.2f}, {max(cancel):.2f}"),
    ]
    table(f"{threads} threads x {questions} questions", ("what", "value"), rows)


if __name__ == "__main__":
    main()
