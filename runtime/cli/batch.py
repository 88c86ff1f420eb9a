"""ppllava-run --batch: every question about every video of a folder."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from ppllava_edge.engines.terminal import progress_steps
from ppllava_edge.runtime.batch import read_questions, run_batch

if TYPE_CHECKING:
    from ppllava_edge.runtime.video_qa import VideoQA


def answer_folder(
    qa: VideoQA,
    folder: str,
    questions: str,
    options: dict[str, Any],
    opening: dict[str, Any],
    asking: dict[str, Any],
) -> None:
    """Answer a file of questions about a folder of videos; exit with status 1 if any failed, now or before.

    Args:
        qa: The model.
        folder: The folder of videos.
        questions: A file with one question per line, or a question.
        options: The command line's options.
        opening, asking: Arguments of VideoQA.open and Video.ask.
    """
    output = options["output"]
    with progress_steps("answering") as progress:
        result = run_batch(
            qa, folder, read_questions(questions), output, opening, asking, progress, options["retry"]
        )
    if options["as_json"]:
        print(json.dumps(vars(result) | {"output": output}))
    else:
        failed = f", {result.failed} failed (their lines say why)" if result.failed else ""
        skipped = f", {result.skipped} already in the output" if result.skipped else ""
        if result.failed_before:
            skipped += f" ({result.failed_before} of them failed; --retry asks them again)"
        click.echo(f"{output}: {result.answered} answered{failed}{skipped}", err=True)
    if result.failed or result.failed_before:
        sys.exit(1)
