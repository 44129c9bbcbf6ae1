"""Text, tables and progress bars. On a terminal, rich draws them if it is installed."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

_GAP = 2  # characters between two columns
_WRAPPED = 12  # characters: the minimum width of a column with wrapped cells


def pluralize(number: int, things: str) -> str:
    """``2, "sessions"`` becomes "2 sessions", ``1, "sessions"`` becomes "1 session"."""
    if number == 1:
        things = re.sub(r"(?<=[^s])s\b", "", things, count=1)
    return f"{number} {things}"


def console() -> Any:
    """Rich's console, or None if the output isn't a terminal or can't show all characters."""
    if not sys.stdout.isatty() or not sys.stdout.encoding.lower().startswith("utf"):
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False, markup=False, emoji=False)  # cells are untrusted text


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    wraps: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> None:
    """Print a table. Columns whose name ends in "#" are numbers, aligned to the right.

    On a narrow terminal, the columns in ``drop`` are left out one by one, from the first. Then the
    cells in the columns ``wraps`` are wrapped.
    """
    names = [name.rstrip("#") for name in columns]
    numbers = [name.endswith("#") for name in columns]
    rows = [names, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    shown = console()
    least = [
        min(width, _WRAPPED) if name in wraps else width
        for name, width in zip(names, widths, strict=True)
    ]
    left = list(range(len(names)))
    for name in drop:
        if sum(least[column] + _GAP for column in left) - _GAP <= _room(shown):
            break
        left.remove(names.index(name))
    if shown is None:
        for row in rows:
            cells = (
                row[column].rjust(widths[column])
                if numbers[column]
                else row[column].ljust(widths[column])
                for column in left
            )
            click.echo((" " * _GAP).join(cells).rstrip())
        return
    from rich.table import Table

    rich = Table(box=None, pad_edge=False)
    for column in left:
        name = names[column]
        rich.add_column(
            name,
            justify="right" if numbers[column] else "left",
            no_wrap=name not in wraps,
            overflow="fold" if name in wraps else "ellipsis",
        )
    for row in rows[1:]:
        rich.add_row(*(row[column] for column in left))
    shown.print(rich)


def lines(text: str, indent: int) -> str:
    """Wrap a text for the terminal, with all lines but the first indented."""
    room = max(20, _room(None) - indent)
    parts = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return ("\n" + " " * indent).join(parts)


def _room(shown: Any) -> int:
    """The width of the output, in characters."""
    if shown is not None:
        return int(shown.width)
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


@contextmanager
def progress(label: str, total: Callable[[], int | None]) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error. Yields the function that advances it.

    ``total`` is called only if a bar is shown. If it returns None or too small a number, the bar
    has no end.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda number: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        with click.progressbar(length=max(1, total() or 1), label=label, file=sys.stderr) as bar:
            yield bar.update
        return
    with Progress(console=Console(stderr=True), transient=True) as rich:
        task = rich.add_task(label, total=total())
        (shown,) = rich.tasks

        def advance(number: int) -> None:
            rich.advance(task, number)
            if shown.total is not None and shown.completed > shown.total:
                shown.total = None

        yield advance
