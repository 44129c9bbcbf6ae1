"""Words, tables and progress bars: by rich on a terminal, where that is installed, else plain."""

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
_WRAPPED = 12  # characters that a column should have whose cells take several lines


def counted(number: int, things: str) -> str:
    """A number of things, in words; of one the first word that ends in "s" loses it."""
    if number == 1:
        things = re.sub(r"(?<=[^s])s\b", "", things, count=1)
    return f"{number} {things}"


def console() -> Any:
    """Rich's console, or None where nobody would see what it can do, or not all of its letters."""
    if not sys.stdout.isatty() or not sys.stdout.encoding.lower().startswith("utf"):
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False, markup=False, emoji=False)  # cells are of anybody's making


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    wraps: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> None:
    """Print a table; a column whose name ends in "#" is of numbers.

    On a terminal that is too narrow the columns ``drop`` are left out, one after the other; then
    what is in the columns ``wraps`` takes several lines.
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
    """A text that begins at that column; on a terminal its words are not torn apart."""
    room = max(20, _room(None) - indent)
    parts = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return ("\n" + " " * indent).join(parts)


def _room(shown: Any) -> int:
    """How many characters a line may have."""
    if shown is not None:
        return int(shown.width)
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


@contextmanager
def progress(label: str, total: Callable[[], int | None]) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal's error output; gives what is called with each further number done.

    ``total`` is asked only where there is a bar. None, or less than was done: it has no end.
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
