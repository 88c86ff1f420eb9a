"""ppllava-run --live: a camera or a stream at the terminal."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import click

from ppllava_edge.engines.errors import MediaError, PPLLaVAError
from ppllava_edge.runtime.live.source import CLOSED, ENDED
from ppllava_edge.runtime.live.view import Live

if TYPE_CHECKING:
    from ppllava_edge.runtime.session.answer import Answer
    from ppllava_edge.runtime.video_qa import VideoQA

FIRST_FRAME = 30.0  # seconds to wait for one before a question is given up


def run_live(
    qa: VideoQA,
    source: str,
    question: str | None,
    every: float,
    last: float | None,
    answers: int | None,
    as_json: bool,
    options: dict[str, Any],
    asking: dict[str, Any],
) -> None:
    """Watch `source`. With a question: ask it every so many seconds, until the source ends or so many answers were given. Without: ask what is typed.

    Raises MediaError if the source ends before anything was seen.
    """

    def said(state: str, why: str) -> None:
        if state != CLOSED:
            click.echo(f"live: {state}{f': {why}' if why else ''}", err=True)

    with Live(qa, source, on_state=said, **options) as live, _StatusLine(live):
        if question is None:
            _converse(live, last, as_json, asking)
        else:
            _repeat(live, question, every, last, answers, as_json, asking)
        final = live.status
    passed = f", {final.dropped} passed over (the encoder was slower)" if final.dropped else ""
    click.echo(f"live: {final.seen} frames seen, {final.encoded} encoded{passed}", err=True)


def _repeat(
    live: Live,
    question: str,
    every: float,
    last: float | None,
    answers: int | None,
    as_json: bool,
    asking: dict[str, Any],
) -> None:
    count = 0
    while answers is None or count < answers:
        began = time.monotonic()
        over = live.status.state in (ENDED, CLOSED)
        if not live.wait_for(1, FIRST_FRAME) and live.status.state in (ENDED, CLOSED):
            raise MediaError(f"{live.status.why or 'the source ended'}; nothing was seen")
        if len(live.window):
            _say(live, live.ask(question, last, **asking), as_json)
            count += 1
        if over:
            return
        while time.monotonic() < began + every and live.status.state not in (ENDED, CLOSED):
            time.sleep(min(0.05, every))


def _converse(live: Live, last: float | None, as_json: bool, asking: dict[str, Any]) -> None:
    """Questions as they are typed (or come through a pipe); an empty line at a terminal, or the end, ends."""
    talking = sys.stdin.isatty()
    if talking:
        click.echo("Ask at any moment; an empty line ends.", err=True)
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        while line := sys.stdin.readline():
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while line := lines.get():
        if not line.strip():
            if talking:
                return
            continue
        try:
            _say(live, live.ask(line, last, wait=FIRST_FRAME, **asking), as_json)
        except PPLLaVAError as error:
            if not talking:
                raise
            click.echo(f"error: {error}", err=True)


def _say(live: Live, answer: Answer, as_json: bool) -> None:
    now = answer.frame_times[-1] if answer.frame_times else 0.0
    print(
        json.dumps({**answer.as_dict(), "live": live.status.as_dict()})
        if as_json
        else f"[{now:8.1f} s] {answer.text}",
        flush=True,
    )


class _StatusLine:
    """What the view does, in one line of stderr that is written over; nothing when stderr is not a terminal."""

    def __init__(self, live: Live):
        self.live, self.over = live, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True) if sys.stderr.isatty() else None

    def _run(self) -> None:
        while not self.over.wait(1.0):
            s = self.live.status
            sys.stderr.write(
                f"\r\x1b[2K{s.state}: {s.encoded} of {s.seen} frames encoded, {s.kept} kept, {s.dropped} passed over, lag {1000 * s.lag:.0f} ms\r"
            )
            sys.stderr.flush()

    def __enter__(self) -> _StatusLine:
        if self.thread:
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        if self.thread:
            self.thread.join()
            sys.stderr.write("\r\x1b[2K")
