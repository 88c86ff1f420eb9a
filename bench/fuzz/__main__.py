"""The command: fuzz for some minutes, and say what was found."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ppllava_edge.engines.terminal import Command, fail, progress_steps, table

try:
    from ppllava_edge.bench.fuzz.campaign import Campaign, Tally
    from ppllava_edge.bench.fuzz.corpus import Corpus
    from ppllava_edge.bench.fuzz.known import known_reason
    from ppllava_edge.bench.fuzz.outcome import Outcome
    from ppllava_edge.bench.fuzz.targets.registry import TARGETS
    from ppllava_edge.bench.fuzz.targets.target import Target
except ModuleNotFoundError as error:
    fail(f"fuzzing needs the package {error.name}: pip install 'ppllava-edge[cpu,export]'")

Progress = Callable[[str, int, int], None]
LINE_SECONDS = 120


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--minutes", type=click.FloatRange(0.01, 10_000), default=10.0, show_default=True, help="How long."
)
@click.option("--inputs", type=click.IntRange(1), help="End after this many inputs.")
@click.option(
    "--corpus",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("fuzz-corpus"),
    show_default=True,
    help="Folder of inputs that grows; findings are kept below it.",
)
@click.option("--targets", metavar="NAME,…", help=f"Only these: {', '.join(TARGETS)}.")
@click.option("--jobs", type=click.IntRange(1, 256), help="Inputs at once.  [default: one per core]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random choices.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def main(
    minutes: float,
    inputs: int | None,
    corpus: Path,
    targets: str | None,
    jobs: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Run mutated files through the code that reads them, each in a child process with limits.

    The exit status is 1 if there are findings that aren't known.
    """
    chosen = _chosen(targets)
    campaign = Campaign(chosen, Corpus(corpus, chosen), seed, _print_finding)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore SIGINT otherwise
        signal.signal(number, signal.default_int_handler)
    with progress_steps("inputs") as draw:
        try:
            campaign.run(jobs or os.cpu_count() or 1, 60 * minutes, inputs, _with_lines(draw))
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
    found = {s for tally in campaign.tallies.values() for s in tally.findings}
    if as_json:
        print(json.dumps({name: _as_json(tally) for name, tally in campaign.tallies.items()}))
    else:
        _show(campaign)
    sys.exit(1 if any(not known_reason(signature) for signature in found) else 0)


def _with_lines(draw: Progress) -> Progress:
    """Also print a line every few minutes, where there is no progress bar."""
    last = time.monotonic()

    def progress(target: str, done: int, total: int) -> None:
        nonlocal last
        draw(target, done, total)
        if not sys.stderr.isatty() and time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            click.echo(f"{done} inputs", err=True)

    return progress


def _chosen(names: str | None) -> list[Target]:
    wanted = [name.strip() for name in names.split(",")] if names else list(TARGETS)
    unknown = [name for name in wanted if name not in TARGETS]
    if unknown:
        raise click.BadParameter(
            f"{', '.join(unknown)}: choose among {', '.join(TARGETS)}", param_hint="--targets"
        )
    return [TARGETS[name] for name in dict.fromkeys(wanted)]


def _print_finding(outcome: Outcome, line: str) -> None:
    reason = known_reason(outcome.signature)
    click.echo(f"found {line}" + (f" (known: {reason})" if reason else ""), err=True)


def _as_json(tally: Tally) -> dict[str, Any]:
    return {**vars(tally), "findings": dict(tally.findings)}


def _show(campaign: Campaign) -> None:
    rows = [
        (
            name,
            t.inputs,
            t.refused,
            t.kept,
            f"{1000 * t.seconds / max(t.inputs, 1):.0f}",
            t.memory >> 20,
            len(t.findings),
        )
        for name, t in campaign.tallies.items()
    ]
    columns = ("target", "inputs", "refused", "new", "ms each", "most MiB", "findings")
    table(f"{campaign.done} inputs", columns, rows)
    found = [(s, n, known_reason(s)) for t in campaign.tallies.values() for s, n in t.findings.items()]
    if found:
        table("findings", ("signature", "times", "known"), sorted(found))


if __name__ == "__main__":
    main()
