"""What a person sees: tables, diffs, progress, errors. The only module that knows rich.

Results go to stdout, talk to stderr.
"""

import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

Advance = Callable[[str], None]
_WIDTH = 80
_STYLES = {"PASS": "bold green", "FAIL": "bold red", "skip": "yellow"}


def say(message: str) -> None:
    """A line for the person at the terminal, on stderr; on a terminal it folds between words, indented."""
    console = _stderr()
    lines = [message]
    if console.is_terminal:
        lines = textwrap.wrap(
            message, console.width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    for line in lines or [""]:
        console.print(escape(line), soft_wrap=True, highlight=False)


def warn(message: str) -> None:
    """A line that must not be missed, on stderr."""
    _stderr().print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True, highlight=False)


def error(message: str) -> None:
    """One line on stderr."""
    _stderr().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)


def internal_error(bug: BaseException) -> None:
    """One line on stderr about a bug of porter's own; its traceback too if PORTER_DEBUG=1."""
    if os.environ.get("PORTER_DEBUG") == "1":
        sys.stderr.write("".join(traceback.format_exception(bug)))
    told = " ".join(str(bug).split())
    error(
        f"internal error: {type(bug).__name__}: {told or 'no message'}; this is a bug in porter, "
        "please report it with what PORTER_DEBUG=1 shows"
    )


def result(text: str) -> None:
    """Plain text on stdout, as it is."""
    _stdout().print(Text(text), soft_wrap=True)


def print_json(value: object) -> None:
    """`value` as JSON on stdout, for machines."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout that fits 80 columns; long cells fold, PASS, FAIL and skip are coloured."""
    view = Table(title=title, title_justify="left", title_style="bold", pad_edge=False, box=None, header_style="dim")
    for column in columns:
        view.add_column(column, overflow="fold")
    for row in rows:
        view.add_row(*[Text(cell, style=_STYLES.get(cell, "")) for cell in row])
    console = _stdout()
    console.print(view, width=min(_WIDTH, console.width))


def diff(lines: Iterable[str]) -> None:
    """A unified diff on stdout, coloured on a terminal; lines that start with `#` are porter's reasons."""
    console = _stdout()
    for line in lines:
        console.print(Text(line, style=_diff_style(line)), soft_wrap=True)


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Advance]:
    """A bar on stderr that goes away when done; call the given function with what is being done next."""
    text = TextColumn("{task.description:<50.50}")
    columns: tuple[ProgressColumn, ...] = (SpinnerColumn(), text, TimeElapsedColumn())
    if total is not None:
        columns = (*columns, BarColumn(bar_width=12), MofNCompleteColumn())
    console = _stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def advance(step: str) -> None:
            bar.update(task, description=step, advance=1)

        yield advance


@contextmanager
def working(title: str) -> Iterator[None]:
    """A spinner on stderr while something of unknown length is done; nothing if that is no terminal."""
    console = _stderr()
    with console.status(escape(title)) if console.is_terminal else nullcontext():
        yield


@contextmanager
def bytes_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on stderr; call the given function with (done, total)."""
    columns = (TextColumn("{task.description:<36.36}"), BarColumn(bar_width=20), DownloadColumn())
    console = _stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def stream(text: str) -> None:
    """Text on stdout as it comes, without a line end."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _diff_style(line: str) -> str:
    if line.startswith(("+++", "---")):
        return "bold"
    return {"+": "green", "-": "red", "@": "cyan", "#": "italic yellow"}.get(line[:1], "")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process here; the command line decides


def _stdout() -> Console:
    return _Console(highlight=False)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)
