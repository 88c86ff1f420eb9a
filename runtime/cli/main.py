"""ppllava-run: ask a video at the terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ppllava_edge.engines.terminal import Command

if TYPE_CHECKING:
    from ppllava_edge.runtime.session.answer import Answer
    from ppllava_edge.runtime.session.video import Video
    from ppllava_edge.runtime.video_qa import VideoQA

DEMO_NOTE = (
    "nano is a tiny demonstration model: it knows drawn shapes, nothing of the real world. "
    "For a real one: ppllava-export CHECKPOINT -o BUNDLE, then ppllava-run --model BUNDLE."
)


class FrameCount(click.ParamType):
    """A number of frames, or "auto"."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto" or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("video")
@click.argument("question", required=False)
@click.option(
    "--model",
    metavar="BUNDLE",
    help="Directory that ppllava-export wrote.  [default: the packed demonstration model]",
)
@click.option(
    "--frames",
    type=FrameCount(),
    help="Frames to look at; auto: more for longer videos.  [default: the model's]",
)
@click.option("--start", type=float, help="Look from here on, in seconds.")
@click.option("--end", type=float, help="Look up to here, in seconds.")
@click.option(
    "--tokens",
    type=int,
    help="Most visual tokens; windows along time grow to keep within.  [default: what the model's windows give]",
)
@click.option(
    "--select",
    type=click.Choice(["uniform", "guided"]),
    default="uniform",
    show_default=True,
    help="guided: the question picks the frames.",
)
@click.option(
    "--candidates",
    type=int,
    default=256,
    show_default=True,
    help="Frames that --select guided encodes to pick from.",
)
@click.option(
    "--keep",
    type=click.Choice(["features", "tokens", "prefix"]),
    default="features",
    show_default=True,
    help="In a chat: features pool anew for each question; tokens go on from the first one's tokens and cache; prefix: without the turns before.",
)
@click.option(
    "--cache", is_flag=True, help="Keep encoded videos on disk, so that asking again later doesn't decode."
)
@click.option(
    "--cache-folder",
    metavar="FOLDER",
    help="Where; implies --cache.  [default: ~/.cache/ppllava-edge/features]",
)
@click.option(
    "--live",
    is_flag=True,
    help="VIDEO is watched as it happens: a camera (/dev/video0), an rtsp:// or http:// stream, or a file in real time.",
)
@click.option(
    "--fps", type=float, default=2.0, show_default=True, help="With --live: frames encoded a second."
)
@click.option("--window", type=int, default=64, show_default=True, help="With --live: frames remembered.")
@click.option(
    "--every",
    type=click.FloatRange(0.01),
    default=5.0,
    show_default=True,
    help="With --live: seconds between questions.",
)
@click.option(
    "--last",
    type=click.FloatRange(0.001),
    help="With --live: look at so many seconds only.  [default: all that is remembered]",
)
@click.option("--answers", type=click.IntRange(1), help="With --live: end after so many.")
@click.option("--no-reconnect", is_flag=True, help="With --live: end when the stream is lost.")
@click.option(
    "--batch",
    is_flag=True,
    help="VIDEO is a folder, QUESTION a file of questions (one a line): answer all about all into -o.",
)
@click.option(
    "-o",
    "--output",
    metavar="JSONL",
    help="With --batch: where answers go; what is there already is not asked again.",
)
@click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Longest answer.")
@click.option("--timeout", type=click.FloatRange(0.001), help="Seconds after which an answer ends as it is.")
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token each time."
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample from the likeliest tokens with this much probability.",
)
@click.option(
    "--top-k", type=int, default=0, show_default=True, help="Sample from this many likeliest tokens; 0: all."
)
@click.option(
    "--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: repeat less."
)
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times.")
@click.option("--template", help="Prompt template by name instead of the bundle's.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="auto, onnxruntime, tensorrt, rtx, standard, or a target of ppllava-build.",
)
@click.option(
    "--look-ahead",
    is_flag=True,
    help="Guess tokens from what was said, verify several at once; the greedy answer stays the same.",
)
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads of the engine.  [default: one per core]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per answer instead of the text.")
@click.option(
    "--save-attention",
    metavar="FILE",
    help="Draw where the question looks: .png, or a film as .mp4, .webm, .gif.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log what happens to stderr.")
def main(video: str, question: str | None, **options: Any) -> None:
    """Answer QUESTION about VIDEO (a file, an image, or a folder of images). Without QUESTION: a chat."""
    from ppllava_edge.runtime.language.sampling import Sampling
    from ppllava_edge.runtime.language.text_processor import clean_question
    from ppllava_edge.runtime.video_qa import VideoQA

    _check(question, options)
    if options["verbose"]:
        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(name)s: %(message)s")
        logging.getLogger("PIL").setLevel(logging.WARNING)
    if question is not None and not options["batch"]:
        question = clean_question(question)
    sampling = Sampling(
        *(options[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed"))
    )
    cache = options["cache_folder"] or options["cache"]
    qa = VideoQA(
        options["model"], options["device"], options["threads"], options["template"], options["engine"], cache
    )
    if qa.is_demo:
        click.echo(DEMO_NOTE, err=True)
    asking = {
        "max_new_tokens": options["max_new_tokens"],
        "sampling": sampling,
        "stop": options["stop"],
        "look_ahead": options["look_ahead"],
        "timeout": options["timeout"],
    }
    opening = {
        name: options[name] for name in ("frames", "start", "end", "tokens", "select", "candidates", "keep")
    }
    if options["live"]:
        from ppllava_edge.runtime.cli.live import run_live

        live = {"fps": options["fps"], "window": options["window"], "reconnect": not options["no_reconnect"]}
        run_live(
            qa,
            video,
            question,
            options["every"],
            options["last"],
            options["answers"],
            options["as_json"],
            live,
            asking,
        )
    elif options["batch"]:
        _batch(qa, video, str(question), options, opening, asking)
    else:
        _ask(qa, video, question, options, opening, asking)


def _check(question: str | None, options: dict[str, Any]) -> None:
    """Options that make no sense together."""
    if options["max_new_tokens"] < 1:
        raise click.UsageError("--max-new-tokens must be 1 or more")
    if options["live"] and options["batch"]:
        raise click.UsageError("--live and --batch don't go together")
    if question is None and options["save_attention"]:
        raise click.UsageError("--save-attention needs a QUESTION")
    if options["save_attention"] and (options["live"] or options["batch"]):
        raise click.UsageError("--save-attention is for one video and one question")
    if options["batch"] and (question is None or not options["output"]):
        raise click.UsageError("--batch needs QUESTION (a file of questions, or one) and -o answers.jsonl")
    if options["output"] and not options["batch"]:
        raise click.UsageError("-o goes with --batch")
    if options["live"]:
        given = [f"--{name}" for name in ("frames", "start", "end", "tokens") if options[name] is not None]
        if given or options["select"] != "uniform" or options["keep"] != "features":
            raise click.UsageError(
                f"{given[0] if given else '--select and --keep'} and --live don't go together; --last says how far to look back"
            )


def _ask(
    qa: VideoQA,
    source: str,
    question: str | None,
    options: dict[str, Any],
    opening: dict[str, Any],
    asking: dict[str, Any],
) -> None:
    with _progress() as progress:
        opened = qa.open(source, progress=progress, **opening)
    for note in [*opened.frames.notes, *filter(None, [qa.pipeline.engine_note])]:
        click.echo(f"note: {note}", err=True)
    if question is None:
        _chat(opened, asking, options["as_json"])
        return
    answer = _answer(opened, question, asking, options["as_json"])
    if options["save_attention"]:
        from ppllava_edge.runtime.session.attention_map import save_attention

        save_attention(opened, question, Path(options["save_attention"]), answer.text)
        click.echo(f"attention: {options['save_attention']}", err=True)


def _batch(
    qa: VideoQA,
    folder: str,
    questions: str,
    options: dict[str, Any],
    opening: dict[str, Any],
    asking: dict[str, Any],
) -> None:
    from ppllava_edge.engines.terminal import progress_steps
    from ppllava_edge.runtime.batch import read_questions, run_batch

    with progress_steps("answering") as progress:
        result = run_batch(
            qa, folder, read_questions(questions), options["output"], opening, asking, progress
        )
    if options["as_json"]:
        print(json.dumps(vars(result) | {"output": options["output"]}))
    else:
        there = f", {result.skipped} were there already" if result.skipped else ""
        failed = f", {result.failed} failed (their lines say why)" if result.failed else ""
        click.echo(f"{options['output']}: {result.answered} answered{failed}{there}", err=True)
    if result.failed:
        sys.exit(1)


def _answer(video: Video, question: str, arguments: dict[str, Any], as_json: bool) -> Answer:
    stream = video.stream(question, **arguments)
    for piece in stream:
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    print(json.dumps(stream.answer.as_dict()) if as_json else "", flush=True)
    for note in stream.answer.notes[
        len(video.frames.notes) :
    ]:  # those of the video were said when it was opened
        click.echo(f"note: {note}", err=True)
    return stream.answer


def _chat(video: Video, arguments: dict[str, Any], as_json: bool) -> None:
    """Questions from the terminal or, one a line, from a pipe; the video stays encoded."""
    from ppllava_edge.engines.errors import PromptError

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

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(
                    {"decode": "reading frames", "vision": "encoding frames"}[what], total=of
                )
            bar.update(tasks[what], completed=done, total=of)

        yield show


if __name__ == "__main__":
    main()
