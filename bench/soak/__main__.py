"""Thousands of questions by threads or asyncio, many of them cancelled, abandoned or too late.

python -m ppllava_edge.bench.soak --questions 10000
python -m ppllava_edge.bench.soak --questions 2000 --asyncio
"""

from __future__ import annotations

import json
import sys

import click

from ppllava_edge.bench.soak.run import soak
from ppllava_edge.engines.terminal import Command, human_bytes, table


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--questions", type=click.IntRange(1), default=10_000, show_default=True, help="Questions to ask."
)
@click.option(
    "--threads", type=click.IntRange(1, 256), default=8, show_default=True, help="Threads that ask."
)
@click.option(
    "--parallel", type=click.IntRange(1, 64), default=4, show_default=True, help="Answers active at once."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
@click.option("--asyncio", "use_asyncio", is_flag=True, help="Ask from asyncio tasks instead of threads.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(questions: int, threads: int, parallel: int, seed: int, use_asyncio: bool, as_json: bool) -> None:
    """Ask nano many questions at once, and check that no slot is lost, no answer wrong, and nothing grows.

    The exit status is 1 if an answer was wrong or something was left over.
    """
    report = soak(questions, threads, parallel, seed, use_asyncio)
    if as_json:
        click.echo(json.dumps(report))
    else:
        left = ", ".join(f"{name}: {count}" for name, count in report["left"].items())
        ended = ", ".join(f"{count} {how}" for how, count in report["ended"].items())
        rows = [
            ("questions", f"{report['questions']} in {report['seconds']:.1f} s"),
            ("ended", ended),
            ("answers of the live view's watch", str(report["watched"])),
            ("wrong", "; ".join(report["wrong"]) or "none"),
            ("left over", left),
            ("resident memory grew by", human_bytes(max(report["growth"], 0))),
        ]
        table("soak", ("what", "value"), rows)
    sys.exit(1 if report["wrong"] or any(report["left"].values()) else 0)


if __name__ == "__main__":
    main()
