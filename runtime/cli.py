"""ppllava-run: ask a video at the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..engines.terminal import Command

if TYPE_CHECKING:
    from .session import Answer, Video

DEMO_NOTE = (
    "nano is a tiny demonstration model: it knows drawn shapes, nothing of the real world. "
    "For a real one: ppllava-export CHECKPOINT -o BUNDLE, then ppllava-run --model BUNDLE."
)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("video")
@click.argument("question", required=False)
@click.option("--model", metavar="BUNDLE", help="Directory that ppllava-export wrote.  [default: the packed demonstration model]")
@click.option("--frames", type=int, help="Frames to look at.  [default: the model's]")
@click.option("--start", type=float, help="Look from here on, in seconds.")
@click.option("--end", type=float, help="Look up to here, in seconds.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token each time.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from the likeliest tokens with this much probability.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Sample from this many likeliest tokens; 0: all.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: repeat less.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times.")
@click.option("--template", help="Prompt template by name instead of the bundle's.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--engine", default="auto", show_default=True, help="auto, onnxruntime, tensorrt, rtx, standard, or a target of ppllava-build.")
@click.option("--look-ahead", is_flag=True, help="Guess tokens from what was said, verify several at once; the greedy answer stays the same.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of the engine.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per answer instead of the text.")
@click.option("--save-attention", metavar="PNG", help="Draw where the question looks.")
def main(video: str, question: str | None, **options: Any) -> None:
    """Answer QUESTION about VIDEO (a file, an image, or a folder of images). Without QUESTION: a chat."""
    from .sampling import Sampling
    from .session import VideoQA
    from .text import clean_question

    if question is not None:
        question = clean_question(question)
    if question is None and options["save_attention"]:
        raise click.UsageError("--save-attention needs a QUESTION")
    sampling = Sampling(*(options[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")))
    if options["max_new_tokens"] < 1:
        raise click.UsageError("--max-new-tokens must be 1 or more")
    qa = VideoQA(options["model"], options["device"], options["threads"], options["template"], options["engine"])
    if qa.is_demo:
        click.echo(DEMO_NOTE, err=True)
    with _progress() as progress:
        opened = qa.open(video, options["frames"], options["start"], options["end"], progress)
    for note in [*opened.frames.notes, *filter(None, [qa.pipeline.engine_note])]:
        click.echo(f"note: {note}", err=True)
    arguments = {"max_new_tokens": options["max_new_tokens"], "sampling": sampling, "stop": options["stop"], "look_ahead": options["look_ahead"]}
    if question is None:
        _chat(opened, arguments, options["as_json"])
        return
    _answer(opened, question, arguments, options["as_json"])
    if options["save_attention"]:
        from .attention_map import save_attention

        save_attention(opened, question, Path(options["save_attention"]))
        click.echo(f"attention: {options['save_attention']}", err=True)


def _answer(video: Video, question: str, arguments: dict[str, Any], as_json: bool) -> Answer:
    stream = video.stream(question, **arguments)
    for piece in stream:
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    print(json.dumps(stream.answer.as_dict()) if as_json else "", flush=True)
    for note in stream.answer.notes[len(video.frames.notes) :]:  # those of the video were said when it was opened
        click.echo(f"note: {note}", err=True)
    return stream.answer


def _chat(video: Video, arguments: dict[str, Any], as_json: bool) -> None:
    """Questions from the terminal or, one a line, from a pipe; the video stays encoded."""
    from ..engines.errors import PromptError

    talking = sys.stdin.isatty()
    if talking:
        click.echo("Ask away; an empty line ends.", err=True)
    while True:
        if talking:
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line or (talking and not line.strip()):
            return
        if line.strip():
            try:
                _answer(video, line, arguments, as_json)
            except PromptError as error:
                if not talking:
                    raise
                click.echo(f"error: {error}", err=True)


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A callback that draws decoding and encoding on stderr; None when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task({"decode": "reading frames", "vision": "encoding frames"}[what], total=of)
            bar.update(tasks[what], completed=done, total=of)

        yield show


if __name__ == "__main__":
    main()
