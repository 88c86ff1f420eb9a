"""Options of ppllava-run that contradict each other or would be ignored are refused; nothing is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ppllava_edge.engines.errors import PPLLaVAError

LIVE_ONLY = ("fps", "window", "every", "last", "answers", "no_reconnect")
BATCH_ONLY = ("output", "retry")
NOT_LIVE = ("tokens", "select", "candidates", "keep", "cache", "cache_folder")
NOT_LIVE_TIME = ("frames", "start", "end")
SAMPLED_ONLY = ("top_p", "top_k", "seed")
REPEATED_ONLY = ("every", "answers")
PICTURES = ("", ".png", ".gif", ".mp4", ".mkv", ".webm")  # suffixes of --save-attention


def check_options(question: str | None, options: dict[str, Any]) -> None:
    """Refuse options that contradict each other, or that this call would ignore.

    Args:
        question: The argument QUESTION.
        options: The options by name; click's current context says which of them were given.

    Raises:
        click.UsageError: With the option's name, and what it goes with.
        PPLLaVAError: If the file of --save-attention can't be written.
    """
    if options["max_new_tokens"] < 1:
        raise click.UsageError("--max-new-tokens must be 1 or more")
    live, batch, picture = options["live"], options["batch"], options["save_attention"]
    if live and batch:
        raise click.UsageError("--live and --batch don't go together")
    if picture and (live or batch):
        raise click.UsageError("--save-attention is for one video and one question")
    if picture and question is None:
        raise click.UsageError("--save-attention needs a QUESTION")
    if batch and (question is None or not options["output"]):
        raise click.UsageError("--batch needs QUESTION (a file of questions, or one) and -o answers.jsonl")
    if options["output"] == "-":
        raise click.UsageError(
            "-o needs a file: a batch reads its earlier answers from it (for one named -: ./-)"
        )
    if not options["isolate"] and any(limit.startswith("memory=") for limit in options["limits"]):
        raise click.UsageError("--limit memory goes with --isolate: it bounds the child process")
    if not batch:
        _refuse(BATCH_ONLY, "goes with --batch")
    if live:
        _refuse(NOT_LIVE_TIME, "and --live don't go together; --last says how far to look back")
        _refuse(NOT_LIVE, "and --live don't go together")
        if question is None:
            _refuse(REPEATED_ONLY, "repeats a QUESTION; give one")
    else:
        _refuse(LIVE_ONLY, "goes with --live")
    if options["select"] != "guided":
        _refuse(("candidates",), "goes with --select guided")
    if options["temperature"] == 0:
        _refuse(SAMPLED_ONLY, "goes with a --temperature above 0: without one, the likeliest token is taken")
    if question is not None and not batch:
        _refuse(("keep",), "is for several questions: a chat (without QUESTION), or --batch")
    if picture:
        _check_picture(Path(picture))


def _refuse(names: tuple[str, ...], why: str) -> None:
    """Refuse these options if they were given."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
        if parameter.name in names and given:
            raise click.UsageError(f"{max(parameter.opts, key=len)} {why}")


def _check_picture(path: Path) -> None:
    """Refuse a file for an attention map that couldn't be written after the answer."""
    if path.suffix.lower() not in PICTURES:
        raise PPLLaVAError(f"--save-attention {path}: the suffix must be one of {' '.join(PICTURES).strip()}")
    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        raise PPLLaVAError(
            f"can't write {path}: {'it is a folder' if path.is_dir() else f'no folder {folder}'}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PPLLaVAError(f"can't write {path}: the folder {folder} is read-only")
