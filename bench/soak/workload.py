"""The model that the soak uses, its videos, and the answers to expect."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

from ppllava_edge.bench.concurrency import QUESTIONS
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.nano import sample_path
from ppllava_edge.runtime.session.answer import Answer
from ppllava_edge.runtime.session.video import Video
from ppllava_edge.runtime.video_qa import VideoQA

MAX_NEW_TOKENS = 8
CALLBACKS_FAIL = 0.1  # share of the app's callbacks that raise
MAX_WRONG = 20  # lines kept
WINDOW = 8  # frames of the live view, all the same


class CallbackError(Exception):
    """Raised by the soak's callbacks, as by an app's mistake."""


class Workload:
    """A model with three videos, a chat that all threads share, a live view with a watch, and broken files.

    Args:
        folder: Where the broken files are written.
        parallel: As VideoQA takes it.
        seed: Of the callbacks' failures.

    Attributes:
        qa: The model.
        videos: Name → video.
        chat: A chat that leaves earlier turns out.
        live: A live view of one picture.
        wrong: Answers that aren't those of a serial run, and errors that nobody expected; one line each.
        watched: Answers of the live view's watch.
    """

    def __init__(self, folder: Path, parallel: int, seed: int):
        self.qa = VideoQA(
            device="cpu", threads=1, parallel=parallel, metrics=lambda event, figures: self._callback()
        )
        self.wrong: list[str] = []
        self.watched = 0
        self._random, self._are_failing = random.Random(seed), False
        self._broken = _broken_files(folder)
        sample = str(sample_path())
        pictures = self.qa.open(sample).frames.images
        self._sources: dict[str, dict[str, Any]] = {
            "whole": {"source": sample},
            "start": {"source": sample, "end": 1.0},
            "pictures": {"source": pictures},
        }
        self.videos = {name: self.qa.open(**source) for name, source in self._sources.items()}
        self.chat = self.qa.open(sample, keep="prefix")
        self.live = self.qa.live(None, fps=1000, window=WINDOW)
        self._picture, self._stopped = pictures[0], threading.Event()
        self._expected = self._serial_answers()
        self._script = [answer.text for answer in self._follow_script()]
        self._are_failing = True
        self.live.watch(
            QUESTIONS[0], 0.5, self._on_answer, max_new_tokens=MAX_NEW_TOKENS, on_error=self._on_error
        )
        self._camera = threading.Thread(target=self._push_frames, name="soak-camera", daemon=True)
        self._camera.start()

    def _serial_answers(self) -> dict[tuple[str, str], str]:
        """(video, question) → the answer of a model that nobody else uses."""
        for i in range(WINDOW):
            self.live.push(self._picture, float(i), wait=True)
        if not self.live.wait_for(WINDOW, 120):
            raise MediaError("the live view encoded no frames")
        of = {**self.videos, "chat": self.chat, "live": self.live.video()}
        return {
            (name, question): video.ask(question, MAX_NEW_TOKENS).text
            for name, video in of.items()
            for question in QUESTIONS
        }

    # -- what threads use ------------------------------------------------------------------------------------

    def check(self, name: str, question: str, answer: Answer) -> str:
        """Compare an answer with the expected one; an unfinished one is its beginning. Returns `finish`."""
        expected = self._expected[name, question]
        is_whole = answer.finish not in ("cancelled", "timeout")
        if answer.text != expected if is_whole else not expected.startswith(answer.text):
            self.note(f"{name}, {question} ({answer.finish}): {answer.text!r} instead of {expected!r}")
        return answer.finish

    def note(self, line: str) -> None:
        """Record something wrong."""
        if len(self.wrong) < MAX_WRONG:
            self.wrong.append(line)

    def open_again(self, rng: random.Random) -> tuple[str, Video]:
        """Open one of the sources anew, with a progress callback that may raise."""
        name = rng.choice(list(self._sources))
        try:
            return name, self.qa.open(**self._sources[name], progress=lambda *done: self._callback())
        except CallbackError:
            return name, self.videos[name]

    def open_broken(self, rng: random.Random) -> str:
        """Open a file that can't be decoded. Returns "refused"."""
        try:
            self.qa.open(rng.choice(self._broken))
        except MediaError:
            return "refused"
        self.note("a broken file was opened")
        return "opened"

    def follow_script(self) -> str:
        """Ask all questions in a new chat that sees its earlier turns. Returns "chat"."""
        texts = [answer.text for answer in self._follow_script()]
        if texts != self._script:
            self.note(f"a chat's answers: {texts} instead of {self._script}")
        return "chat"

    def _follow_script(self) -> list[Answer]:
        chat = self.qa.open(self._sources["whole"]["source"], keep="tokens")
        return [chat.ask(question, MAX_NEW_TOKENS) for question in QUESTIONS[:3]]

    # -- callbacks and the camera ----------------------------------------------------------------------------

    def _callback(self) -> None:
        if self._are_failing and self._random.random() < CALLBACKS_FAIL:
            raise CallbackError("the app's own mistake")

    def _on_answer(self, answer: Answer) -> None:
        self.check("live", QUESTIONS[0], answer)
        self.watched += 1
        self._callback()

    def _on_error(self, error: Exception) -> None:
        self._callback()

    def _push_frames(self) -> None:
        seconds = float(WINDOW)
        while not self._stopped.wait(0.2):
            self.live.push(self._picture, seconds)
            seconds += 0.2

    def stop(self) -> None:
        """Stop the camera and close the live view and its watch."""
        self._stopped.set()
        self._camera.join()
        self.live.close()

    def leftovers(self) -> dict[str, int]:
        """What must be 0 when no question is under way: held slots, waiting threads, engine locks, turns."""
        admission, engine_lock = self.qa.admission, self.qa.engine_lock
        turn = self.chat._chat.turn if self.chat._chat is not None else engine_lock
        return {
            "slots": admission.held,
            "waiting": admission.waiting + engine_lock.waiting + turn.waiting,
            "engine locks": engine_lock.held,
            "turns": turn.held,
        }


def _broken_files(folder: Path) -> list[str]:
    """Files that open must refuse: empty, not a video, cut off, damaged from the first byte on."""
    sample = sample_path().read_bytes()
    contents: dict[str, bytes] = {
        "empty.mp4": b"",
        "text.mp4": b"ffconcat version 1.0\nfile /etc/hostname\n",
        "cut.mp4": sample[: len(sample) // 3],
        "zeros.png": bytes(1000),
        "cut.gif": b"GIF89a\x40\x00\x40\x00",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [str(folder / name) for name in contents] + [str(folder / "missing.mp4")]
