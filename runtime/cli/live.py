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
from ppllava_edge.runtime.cli.ask import accept_any_bytes
from ppllava_edge.runtime.live.status import CLOSED, ENDED
from ppllava_edge.runtime.live.view import Live

if TYPE_CHECKING:
    from ppllava_edge.runtime.session.answer import Answer
    from ppllava_edge.runtime.video_qa import VideoQA

FIRST_FRAME = 30.0  # seconds to wait for the first frame before a question fails
POLL = 0.05  # seconds between checks whether the source ended
OVERWRITE_LINE = "\r\x1b[2K"


def run_live(
    qa: VideoQA, source: str, question: str | None, options: dict[str, Any], asking: dict[str, Any]
) -> None:
    """Watch a source and print answers.

    Args:
        qa: The model.
        source: A file, a device or an address.
        question: Asked every `options["every"]` seconds, until the source ends or after `options["answers"]`
            answers; None: questions are read from the terminal.
        options: The command line's options.
        asking: Arguments of Live.ask.

    Raises:
        MediaError: If the source ends before a frame was encoded.
    """

    def print_state(state: str, why: str) -> None:
        if state != CLOSED:
            click.echo(f"live: {state}{f': {why}' if why else ''}", err=True)

    fps, window, reconnect = options["fps"], options["window"], not options["no_reconnect"]
    asking = {**asking, "last": options["last"]}
    with Live(qa, source, fps, window, reconnect=reconnect, on_state=print_state) as live, _StatusLine(live):
        if question is None:
            _chat(live, options["as_json"], asking)
        else:
            _repeat(live, question, options, asking)
        status = live.status
    dropped = f", {status.dropped} dropped (the encoder was slower)" if status.dropped else ""
    click.echo(f"live: {status.seen} frames seen, {status.encoded} encoded{dropped}", err=True)


def _ended(live: Live) -> bool:
    return live.status.state in (ENDED, CLOSED)


def _repeat(live: Live, question: str, options: dict[str, Any], asking: dict[str, Any]) -> None:
    every, answers, count = options["every"], options["answers"], 0
    while answers is None or count < answers:
        began = time.monotonic()
        is_last = _ended(live)
        if not live.wait_for(1, FIRST_FRAME) and _ended(live):
            raise MediaError(f"{live.status.why or 'the source ended'}; nothing was seen")
        if len(live.window):
            _print_answer(live, live.ask(question, **asking), options["as_json"])
            count += 1
        if is_last:
            return
        while time.monotonic() < began + every and not _ended(live):
            time.sleep(min(POLL, every))


def _chat(live: Live, as_json: bool, asking: dict[str, Any]) -> None:
    """Answer questions from stdin until it ends or, at a terminal, an empty line."""
    interactive = sys.stdin.isatty()
    if interactive:
        click.echo("Ask at any moment; an empty line ends.", err=True)
    lines: queue.Queue[str] = queue.Queue()
    accept_any_bytes(sys.stdin)

    def read() -> None:
        try:
            while line := sys.stdin.readline():
                lines.put(line)
        finally:
            lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while line := lines.get():
        if not line.strip():
            if interactive:
                return
            continue
        try:
            _print_answer(live, live.ask(line, wait=FIRST_FRAME, **asking), as_json)
        except PPLLaVAError as error:
            if not interactive:
                raise
            click.echo(f"error: {error}", err=True)


def _print_answer(live: Live, answer: Answer, as_json: bool) -> None:
    if as_json:
        line = json.dumps({**answer.as_dict(), "live": live.status.as_dict()})
    else:
        seconds = answer.frame_times[-1] if answer.frame_times else 0.0
        line = f"[{seconds:8.1f} s] {answer.text}"
    print(line, flush=True)


class _StatusLine:
    """Show the view's status in one line on stderr, updated every second, if stderr is a terminal."""

    def __init__(self, live: Live):
        self.live = live
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True) if sys.stderr.isatty() else None

    def _run(self) -> None:
        while not self.stopped.wait(1.0):
            s = self.live.status
            frames = f"{s.encoded} of {s.seen} frames encoded, {s.kept} kept, {s.dropped} dropped"
            sys.stderr.write(f"{OVERWRITE_LINE}{s.state}: {frames}, lag {1000 * s.lag:.0f} ms\r")
            sys.stderr.flush()

    def __enter__(self) -> _StatusLine:
        if self.thread:
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        if self.thread:
            self.thread.join()
            sys.stderr.write(OVERWRITE_LINE)
