"""ppllava-run: ask a video at the terminal."""

from __future__ import annotations

import logging
from typing import Any

import click

from ppllava_edge.engines.terminal import Command, option
from ppllava_edge.runtime.cli.options import check_options

DEMO_NOTE = (
    "nano is a tiny demonstration model: it knows drawn shapes, nothing of the real world. "
    "For a real one: ppllava-export CHECKPOINT -o BUNDLE, then ppllava-run --model BUNDLE."
)
OPENING = ("frames", "start", "end", "tokens", "select", "candidates", "keep")  # options of VideoQA.open
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")  # options of Sampling
ASKING = ("max_new_tokens", "stop", "look_ahead", "timeout")  # options of Video.ask, beside sampling


class FrameCount(click.ParamType):
    """A number of frames, or "auto"."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Convert the option's text."""
        if value == "auto" or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("video")
@click.argument("question", required=False)
@option(
    "--model",
    group="Model",
    metavar="BUNDLE",
    help="Directory that ppllava-export wrote, or nano.  [default: nano, the packed demonstration model]",
)
@option("--template", group="Model", help="Name of a prompt template.  [default: the bundle's own]")
@option(
    "--device",
    group="Model",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Processor to run on.",
    default="auto",
    show_default=True,
)
@option(
    "--engine",
    group="Model",
    default="auto",
    show_default=True,
    help="auto, onnxruntime, tensorrt, rtx, standard, or a target of ppllava-build.",
)
@option(
    "--threads",
    group="Model",
    type=click.IntRange(1, 1024),
    help="CPU threads of the engine.  [default: one per core]",
)
@option(
    "--frames",
    group="Frames",
    type=FrameCount(),
    help="Frames that the model sees; auto: more for longer videos.  [default: the model's]",
)
@option("--start", group="Frames", type=float, help="Start of the part to use, in seconds.")
@option("--end", group="Frames", type=float, help="End of the part to use, in seconds.")
@option(
    "--tokens",
    group="Frames",
    type=int,
    help="Maximum visual tokens; pooling windows grow to fit.  [default: what the model's windows give]",
)
@option(
    "--select",
    group="Frames",
    type=click.Choice(["uniform", "guided"]),
    default="uniform",
    show_default=True,
    help="uniform: evenly spaced frames; guided: the frames most similar to the question.",
)
@option(
    "--candidates",
    group="Frames",
    type=int,
    default=256,
    show_default=True,
    help="With --select guided: frames to encode and choose from.",
)
@option(
    "--cache",
    group="Frames",
    is_flag=True,
    help="Cache encoded videos on disk; asking again later decodes nothing.",
)
@option(
    "--cache-folder",
    group="Frames",
    metavar="FOLDER",
    help="Folder of the cache; implies --cache.  [default: ~/.cache/ppllava-edge/features]",
)
@option(
    "--isolate",
    group="Frames",
    is_flag=True,
    help="Decode in a child process with a memory limit: a file that crashes the decoder is an error.",
)
@option(
    "--limit",
    "limits",
    group="Frames",
    multiple=True,
    metavar="NAME=VALUE",
    help="What a source may cost: max_side, max_pixels, decode_seconds, …; may be given several times.",
)
@option(
    "--max-new-tokens", group="Generation", type=int, default=256, show_default=True, help="Tokens at most."
)
@option(
    "--timeout",
    group="Generation",
    type=click.FloatRange(0.001),
    help="Seconds after which generation stops.  [default: none]",
)
@option(
    "--temperature",
    group="Generation",
    type=float,
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0: greedy.",
)
@option(
    "--top-p",
    group="Generation",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens whose probabilities add up to this.",
)
@option(
    "--top-k",
    group="Generation",
    type=int,
    default=0,
    show_default=True,
    help="Sample from this many most likely tokens; 0: all.",
)
@option(
    "--repetition-penalty",
    group="Generation",
    type=float,
    default=1.0,
    show_default=True,
    help="Above 1: repeat less.",
)
@option("--seed", group="Generation", type=int, help="Seed, to make sampling repeatable.")
@option(
    "--stop", group="Generation", multiple=True, help="Text that ends the answer; may be given several times."
)
@option(
    "--look-ahead",
    group="Generation",
    is_flag=True,
    help="Prompt lookup: draft tokens from the prompt, verify several at once. Greedy answers don't change.",
)
@option(
    "--keep",
    group="Chat",
    type=click.Choice(["features", "tokens", "prefix"]),
    default="features",
    show_default=True,
    help="What later questions reuse. features: the encoded frames. tokens: also the first question's "
    "visual tokens and the KV cache with all turns. prefix: as tokens, without earlier turns.",
)
@option(
    "--live",
    group="Live view (with --live)",
    is_flag=True,
    help="Watch VIDEO live: a camera (/dev/video0), an rtsp:// or http:// stream, or a file in real time.",
)
@option(
    "--fps",
    group="Live view (with --live)",
    type=float,
    default=2.0,
    show_default=True,
    help="Frames to encode per second.",
)
@option(
    "--window",
    group="Live view (with --live)",
    type=int,
    default=64,
    show_default=True,
    help="Encoded frames to keep.",
)
@option(
    "--every",
    group="Live view (with --live)",
    type=click.FloatRange(0.01),
    default=5.0,
    show_default=True,
    help="Seconds between questions.",
)
@option(
    "--last",
    group="Live view (with --live)",
    type=click.FloatRange(0.001),
    help="Seconds to look back from the newest frame.  [default: the whole window]",
)
@option(
    "--answers", group="Live view (with --live)", type=click.IntRange(1), help="Stop after this many answers."
)
@option("--no-reconnect", group="Live view (with --live)", is_flag=True, help="End when the stream is lost.")
@option(
    "--batch",
    group="Batch (with --batch)",
    is_flag=True,
    help="Ask every question in the file QUESTION (one per line) about every video in the folder VIDEO.",
)
@option(
    "-o",
    "--output",
    group="Batch (with --batch)",
    metavar="JSONL",
    help="File to append answers to; pairs already in it are skipped.",
)
@option(
    "--retry",
    group="Batch (with --batch)",
    is_flag=True,
    help="Ask again where the output has an error. A pair's last line counts.",
)
@option("--json", "as_json", group="Output", is_flag=True, help="Print each answer as a line of JSON.")
@option(
    "--save-attention",
    group="Output",
    metavar="FILE",
    help="Draw what the question attends to: .png, or a video as .mp4, .mkv, .webm, .gif.",
)
@option("-v", "--verbose", group="Output", is_flag=True, help="Log to stderr.")
def main(video: str, question: str | None, **options: Any) -> None:
    """Answer QUESTION about VIDEO (a file, an image, or a folder of images). Without QUESTION: a chat."""
    from ppllava_edge.runtime.language.sampling import Sampling
    from ppllava_edge.runtime.language.text_processor import clean_question
    from ppllava_edge.runtime.media.limits import MediaLimits
    from ppllava_edge.runtime.video_qa import VideoQA

    check_options(question, options)
    if options["verbose"]:
        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(name)s: %(message)s")
        logging.getLogger("PIL").setLevel(logging.WARNING)
    if question is not None and not options["batch"]:
        question = clean_question(question)
    sampling = Sampling(**{name: options[name] for name in SAMPLING})
    qa = VideoQA(
        options["model"],
        device=options["device"],
        threads=options["threads"],
        template=options["template"],
        engine=options["engine"],
        cache=options["cache_folder"] or options["cache"],
        limits=MediaLimits.parse(options["limits"]),
        isolate=options["isolate"],
    )
    if qa.is_demo:
        click.echo(DEMO_NOTE, err=True)
    opening = {name: options[name] for name in OPENING}
    asking = {"sampling": sampling, **{name: options[name] for name in ASKING}}
    if options["live"]:
        from ppllava_edge.runtime.cli.live import run_live

        run_live(qa, video, question, options, asking)
    elif options["batch"]:
        from ppllava_edge.runtime.cli.batch import answer_folder

        answer_folder(qa, video, str(question), options, opening, asking)
    else:
        from ppllava_edge.runtime.cli.ask import ask_video

        ask_video(qa, video, question, options, opening, asking)
