"""ppllava-run with one video: one question, or a chat."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from ppllava_edge.engines.errors import PPLLaVAError, PromptError

if TYPE_CHECKING:
    from ppllava_edge.runtime.encoding.frame_encoder import Progress
    from ppllava_edge.runtime.session.answer import Answer
    from ppllava_edge.runtime.session.video import Video
    from ppllava_edge.runtime.video_qa import VideoQA

STEPS = {"decode": "reading frames", "vision": "encoding frames"}


def ask_video(
    qa: VideoQA,
    source: str,
    question: str | None,
    options: dict[str, Any],
    opening: dict[str, Any],
    asking: dict[str, Any],
) -> None:
    """Open a video and answer.

    Args:
        qa: The model.
        source: A video, an image, or a folder of images.
        question: Answered once; None: questions are read from stdin.
        options: The command line's options.
        opening, asking: Arguments of VideoQA.open and Video.ask.
    """
    as_json, attention = options["as_json"], options["save_attention"]
    with _progress() as progress:
        video = qa.open(source, progress=progress, **opening)
    if attention and not qa.pipeline.manifest.pooling.guided:
        raise PPLLaVAError(f"--save-attention: {qa.pipeline.manifest.name} pools without the question")
    for note in [*video.frames.notes, *filter(None, [qa.pipeline.engine_note])]:
        click.echo(f"note: {note}", err=True)
    if question is None:
        _chat(video, asking, options)
        return
    answer = _print_answer(video, question, asking, as_json or options["verbose"], as_json)
    if attention:
        from ppllava_edge.runtime.session.attention_map import save_attention

        save_attention(video, question, Path(attention), answer.text)
        click.echo(f"attention: {attention}", err=True)


def _print_answer(
    video: Video, question: str, asking: dict[str, Any], at_once: bool, as_json: bool
) -> Answer:
    """Print an answer as it is generated, or at once (a log would be mixed with it), then its notes."""
    with contextlib.closing(video.stream(question, **asking)) as stream:
        for piece in stream:
            if not at_once:
                sys.stdout.write(piece)
                sys.stdout.flush()
        answer = stream.answer
    text = answer.text if at_once else ""
    print(json.dumps(answer.as_dict()) if as_json else text, flush=True)
    if answer.finish == "timeout":
        click.echo(f"note: --timeout {asking['timeout']:g} ended the answer", err=True)
    # The video's own notes come first; they were printed when it was opened.
    for note in answer.notes[len(video.frames.notes) :]:
        click.echo(f"note: {note}", err=True)
    return answer


def _chat(video: Video, asking: dict[str, Any], options: dict[str, Any]) -> None:
    """Answer questions from stdin until it ends or, at a terminal, an empty line."""
    as_json, interactive = options["as_json"], sys.stdin.isatty()
    accept_any_bytes(sys.stdin)
    if interactive:
        click.echo("Ask away; an empty line ends.", err=True)
    while True:
        if interactive:
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line or (interactive and not line.strip()):
            return
        if not line.strip():
            continue
        try:
            _print_answer(video, line, asking, as_json or options["verbose"], as_json)
        except PromptError as error:
            if not interactive:
                raise
            click.echo(f"error: {error}", err=True)


def accept_any_bytes(stream: TextIO) -> None:
    """Read bytes that aren't text as surrogates, which a question refuses in one line."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")


@contextlib.contextmanager
def _progress() -> Iterator[Progress | None]:
    """A callback that draws decoding and encoding on stderr; None if stderr isn't a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(STEPS[step], total=total)
            bar.update(tasks[step], completed=done, total=total)

        yield show
