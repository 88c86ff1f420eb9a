"""Many threads asking one engine: are answers the same, how fast, and how soon does a cancelled answer end?

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
from ppllava_edge.runtime.session.video import Video
from ppllava_edge.runtime.video_qa import VideoQA

QUESTIONS = (
    "What color is the circle?",
    "Describe the video.",
    "How many objects are there?",
    "Where is the blue square?",
    "Is there a red circle?",
)


def measure(threads: int, questions: int, cancels: int, model: str | None, video: str) -> dict[str, Any]:
    """Ask the same questions one after another, then from many threads at once.

    Args:
        threads: Threads that ask.
        questions: Questions of every thread.
        cancels: Streams to close early.
        model: As VideoQA takes it.
        video: A video file.

    Returns:
        "serial", "concurrent", "first_thread" (until the first thread finished): seconds. "wrong": concurrent
        answers that differ from the serial ones. "cancel": seconds of every cancellation. "threads",
        "questions": as given.
    """
    qa = VideoQA(model, device="cpu")
    videos = [qa.open(video), qa.open(video, end=1.0)]
    expected = {(i, question): v.ask(question).text for i, v in enumerate(videos) for question in QUESTIONS}
    plans = [
        [((t + n) % 2, QUESTIONS[(3 * t + n) % len(QUESTIONS)]) for n in range(questions)]
        for t in range(threads)
    ]
    wrong = list[tuple[int, str]]()
    ended = list[float]()

    def work(plan: list[tuple[int, str]]) -> None:
        wrong.extend(
            (i, question) for i, question in plan if videos[i].ask(question).text != expected[i, question]
        )
        ended.append(time.perf_counter())

    started = time.perf_counter()
    for plan in plans:
        work(plan)
    serial = time.perf_counter() - started
    wrong_serial = len(wrong)
    ended.clear()
    started = time.perf_counter()
    workers = [threading.Thread(target=work, args=(plan,)) for plan in plans]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    finished = [t - started for t in ended]
    return {
        "threads": threads,
        "questions": questions,
        "serial": serial,
        "concurrent": max(finished),
        "first_thread": min(finished),
        "wrong": len(wrong) - wrong_serial,
        "cancel": [cancel_latency(videos[0]) for _ in range(cancels)],
    }


def cancel_latency(video: Video) -> float:
    """Seconds from close() in one thread until the stream ended in another."""
    stream = video.stream("Describe the video.")
    begun = threading.Event()
    ended = list[float]()

    def read() -> None:
        for _ in stream:
            begun.set()
        ended.append(time.perf_counter())

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    closed = time.perf_counter()
    stream.close()
    reader.join()
    return max(ended[0] - closed, 0.0)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--threads", type=click.IntRange(1, 64), default=8, show_default=True, help="Threads that ask at once."
)
@click.option(
    "--questions",
    type=click.IntRange(1, 100000),
    default=50,
    show_default=True,
    help="Questions of every thread.",
)
@click.option(
    "--cancels", type=click.IntRange(1, 10000), default=50, show_default=True, help="Answers to cancel."
)
@click.option("--model", metavar="BUNDLE", help="A bundle instead of the packed one.")
@click.option("--video", type=click.Path(exists=True), help="A video file.  [default: nano's sample]")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(
    threads: int, questions: int, cancels: int, model: str | None, video: str | None, as_json: bool
) -> None:
    """Ask from many threads at once, and compare with asking one after another."""
    report = measure(threads, questions, cancels, model, video or str(sample_path()))
    if as_json:
        print(json.dumps(report))
        return
    cancel = [1000 * seconds for seconds in report["cancel"]]
    rows = [
        ("one after another, s", f"{report['serial']:.2f}"),
        ("at once, s", f"{report['concurrent']:.2f}"),
        ("first thread done after, s", f"{report['first_thread']:.2f}"),
        ("answers that differ", report["wrong"]),
        ("time to cancel, ms: median, maximum", f"{np.median(cancel):.2f}, {max(cancel):.2f}"),
    ]
    table(f"{threads} threads x {questions} questions", ("what", "value"), rows)


if __name__ == "__main__":
    main()
