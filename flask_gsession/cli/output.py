"""Tables and progress bars: by rich on a terminal, where that is installed, else plain."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click


def console() -> Any:
    """Rich's console, or None where nobody would see what it can do, or not all of its letters."""
    if not sys.stdout.isatty() or not sys.stdout.encoding.lower().startswith("utf"):
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False, markup=False, emoji=False)  # cells are of anybody's making


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "") -> None:
    """Print a table; a column whose name ends in "#" is of numbers."""
    names = [name.rstrip("#") for name in columns]
    numbers = [name.endswith("#") for name in columns]
    shown = console()
    if shown is None:
        _plain(names, numbers, [names, *rows])
        return
    from rich.table import Table

    rich = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for name, number in zip(names, numbers, strict=True):
        rich.add_column(name, justify="right" if number else "left", no_wrap=name == "handle")
    for row in rows:
        rich.add_row(*row)
    shown.print(rich)


def _plain(names: Sequence[str], numbers: Sequence[bool], rows: list[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    for row in rows:
        cells = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        )
        click.echo("  ".join(cells).rstrip())


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal's error output; gives what is called with each further number done."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda number: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        with click.progressbar(length=max(1, total or 1), label=label, file=sys.stderr) as bar:
            yield bar.update
        return
    with Progress(console=Console(stderr=True), transient=True) as rich:
        task = rich.add_task(label, total=total)
        yield lambda number: rich.advance(task, number)
