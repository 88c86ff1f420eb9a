"""Kill export, build, calibration, batch and the feature cache at every write, and run them again.

    python -m ppllava_edge.bench.crash_points [--only TEXT] [--sample N]

Linux with a C compiler. The figures of docs/measurements.md come from a run without options.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import click

from ppllava_edge.bench.crash_points.runs import Runner, as_row, compile_shim
from ppllava_edge.bench.crash_points.scenarios import SCENARIOS
from ppllava_edge.bench.crash_points.table import Row, crash_row
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.terminal import Command, table


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", metavar="NAME", help="Only this command, or all whose names contain this.")
@click.option("--sample", type=click.IntRange(1), help="At most so many kills per command.  [default: all]")
@click.option(
    "--faults",
    type=click.IntRange(0),
    default=12,
    show_default=True,
    help="Calls per command from which on the disk is full, over quota, read-only, or broken.",
)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Folder to work in.  [default: a temporary one]"
)
@click.option("-v", "--verbose", is_flag=True, help="Print a line before each disturbed run.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(
    only: str | None, sample: int | None, faults: int, folder: Path | None, verbose: bool, as_json: bool
) -> None:
    """Kill commands at every write, rename and sync; run them again. Exit status 1 if a result differs."""
    if find_spec("onnx") is None:
        raise PPLLaVAError("the commands need the package onnx: pip install 'ppllava-edge[cpu,export]'")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        base = Path(scratch).resolve()
        (base / "logs").mkdir()
        home = base / "home"
        home.mkdir()
        with Runner(compile_shim(base), home, base / "logs") as runner:
            names = [scenario.name for scenario in SCENARIOS]
            for scenario in SCENARIOS:
                if not only or only == scenario.name or (only in scenario.name and only not in names):
                    show = lambda line, name=scenario.name: click.echo(f"{name}: {line}", err=True)  # noqa: E731
                    row = crash_row(
                        scenario, runner, base, sample, faults, show if verbose else lambda line: None
                    )
                    rows.append(row)
                    for problem in row.problems:
                        click.echo(f"{row.name}: {problem}", err=True)
    if as_json:
        click.echo(json.dumps([as_row(row) for row in rows]))
    else:
        columns = ("command", "calls", "disturbed", "killed", "same result", "target after", "problems")
        cells = [(r.name, r.points, r.tried, r.killed, r.same, _states(r), len(r.problems)) for r in rows]
        table("commands killed or refused by the disk, and run again", columns, cells)
    sys.exit(1 if any(row.problems for row in rows) else 0)


def _states(row: Row) -> str:
    return ", ".join(f"{count} {name}" for name, count in row.states.items())


if __name__ == "__main__":
    main()
