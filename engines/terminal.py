"""Shared by all commands: grouped options, one-line errors, tables, and progress bars on stderr."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from ppllava_edge.engines.errors import PPLLaVAError

HELP_COLUMN = 30  # characters, at most, before the help texts (click's own default)


class Option(click.Option):
    """An option with a heading of its own in `--help`.

    Args:
        group: The heading; options with the same one are listed together. None: "Other options".
    """

    def __init__(self, *args: Any, group: str | None = None, **attributes: Any):
        super().__init__(*args, **attributes)
        self.group = group


option = functools.partial(click.option, cls=Option)  # click.option that takes `group=` too


class Command(click.Command):
    """A click command with grouped options in `--help` and one-line errors.

    Errors go to stderr without a traceback; the exit status is the error's, usually 2.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options by group, in the order in which the groups first appear."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", None) or "", []).append(record)
        names = [len(name) for records in groups.values() for name, _ in records]
        width = min(max(names), HELP_COLUMN)  # so that the help texts of all groups line up
        if "" in groups:
            ungrouped = groups.pop("")
            groups["Other options" if groups else "Options"] = ungrouped
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in records], HELP_COLUMN)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command; see click. Streams that the caller closed become /dev/null."""
        _open_standard_streams()
        return super().main(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _terminated_is_raised():
                return super().invoke(ctx)
        except PPLLaVAError as error:
            fail(self.with_options(str(error)), error.exit_status)
        except Terminated:
            click.echo("terminated", err=True)
            sys.exit(128 + signal.SIGTERM)
        except BrokenPipeError:  # the output's reader has exited, as in `ppllava-info | head`
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
            fail(f"{error.filename or 'output'}: {error.strerror}")

    def with_options(self, text: str) -> str:
        """Write the arguments that a library's error names as this command's options.

        Errors name arguments as "frames must be …" at their beginning, and "use device=cpu" anywhere.
        """
        given = [p for p in self.params if isinstance(p, click.Option) and p.name]
        options = {str(p.name): max(p.opts, key=len) for p in given}
        names = "|".join(map(re.escape, options))
        text = re.sub(rf"^({names})(?= (?:must|needs)\b)", lambda m: options[m[1]], text)
        return re.sub(rf"(?<![^\s(])({names})=(?=\w)", lambda m: f"{options[m[1]]} ", text)


class Terminated(BaseException):
    """The process received SIGTERM. Not an Exception: everything is cleaned up on its way."""


@contextlib.contextmanager
def _terminated_is_raised() -> Iterator[None]:
    """Raise Terminated at SIGTERM, so that files and child processes are cleaned up as after an interrupt."""

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open_standard_streams() -> None:
    """Open /dev/null where the caller closed stdin, stdout or stderr: the next file would take its number.

    Letters that stdout can't encode are written as escapes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer in letters that the terminal lacks


def fail(message: str, status: int = 2) -> None:
    """Print an error in one line on stderr and exit.

    Args:
        message: What is wrong, where, and what to do.
        status: The exit status.
    """
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(status)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], err: bool = False) -> None:
    """Print a table. Columns of numbers are right-aligned.

    Args:
        title: The line above the table.
        columns: Column headings.
        rows: One value per column each.
        err: Print to stderr.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    printed = Table(title=escape(title), title_justify="left")
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[i]) for row in rows)
        printed.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        printed.add_row(*(escape(str(cell)) for cell in row))  # 'ppllava-edge[cpu]' isn't markup
    Console(stderr=err, highlight=False).print(printed)


@contextlib.contextmanager
def progress_steps(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Draw a progress bar on stderr, if stderr is a terminal.

    Args:
        title: Text before the bar.

    Yields:
        A function (what, done, total) that updates the bar.
    """
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {what}", completed=done, total=total)

        yield update


def _is_number(cell: object) -> bool:
    """Whether a cell is a number, or starts with one as "12.3 MB" does."""
    if isinstance(cell, (int, float)):
        return True
    return str(cell).replace(",", "").replace(".", "").split(" ")[0].isdigit()


def human_bytes(count: float) -> str:
    """A human-readable size: 12300000 → "12.3 MB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def triple(name: str) -> Callable[[click.Context, click.Parameter, str | None], tuple[int, int, int] | None]:
    """Make the click callback of an option like --kernel 2,3,3.

    Args:
        name: The option, for messages.

    Returns:
        A callback that parses three whole numbers of 1 or more: frames, rows, columns.
    """

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
