"""What all command lines share: errors in one line, tables, progress on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from ppllava_edge.engines.errors import PPLLaVAError


class Command(click.Command):
    """A click command whose errors are one line on stderr and exit status 2, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PPLLaVAError as error:
            fail(str(error), error.exit_status)
        except BrokenPipeError:  # the reader of our output went away: nothing to say to it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except MemoryError:
            fail("out of memory; use fewer frames, a smaller model or a lower precision")
        except OSError as error:
            if not error.strerror:
                raise
            fail(f"{error.filename or 'file'}: {error.strerror}")


def fail(message: str, status: int = 2) -> None:
    """Print one line and exit."""
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(status)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], err: bool = False) -> None:
    """Print a table; numbers are right-aligned."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    t = Table(title=escape(title), title_justify="left")
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[i]) for row in rows)
        t.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        t.add_row(*(escape(str(cell)) for cell in row))  # 'ppllava-edge[cpu]' is no markup
    Console(stderr=err, highlight=False).print(t)


@contextlib.contextmanager
def progress_steps(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, of how many) that draws a bar on stderr; silent when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda what, done, of: bar.update(
            task, description=f"{title}: {what}", completed=done, total=of
        )


def _is_number(cell: object) -> bool:
    return (
        isinstance(cell, (int, float)) or str(cell).replace(",", "").replace(".", "").split(" ")[0].isdigit()
    )


def human_bytes(count: float) -> str:
    """ "12.3 MB" """
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def triple(name: str) -> Callable[[click.Context, click.Parameter, str | None], tuple[int, int, int] | None]:
    """A click callback for options like --kernel 2,3,3."""

    def parse(
        ctx: click.Context, parameter: click.Parameter, value: str | None
    ) -> tuple[int, int, int] | None:
        if value is None:
            return None
        try:
            t, h, w = (int(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(
                f"{name} needs three whole numbers, frames,rows,columns: like 2,3,3"
            ) from None
        if min(t, h, w) < 1:
            raise click.BadParameter(f"{name} must be 1 or more in every direction")
        return t, h, w

    return parse
