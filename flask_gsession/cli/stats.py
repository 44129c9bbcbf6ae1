"""``flask gsession stats``."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import click
from flask.cli import with_appcontext

from ..repository.scanning import all_pages
from .common import (
    choose_interface,
    estimate_count,
    json_option,
    print_store,
    report_failures,
    require_scans,
    session_option,
)
from .output import progress, table

_AGES = {"to 1 hour": 3600, "to 1 day": 86400, "to 7 days": 7 * 86400, "to 30 days": 30 * 86400}
_OLDER = "older"
_BAR = 40  # characters


@click.command(short_help="Count the sessions, by size and by age.")
@session_option
@json_option
@with_appcontext
def stats(cookie: str | None, as_json: bool) -> None:
    """Count the sessions, by size and by age."""
    interface = choose_interface(cookie)
    print_store(interface)
    now = interface.repository.now()
    ages: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    sessions = bytes_ = largest = pointers = unreadable = 0
    with report_failures(interface):
        store = require_scans(interface)
        with progress("counting", partial(estimate_count, interface)) as advance:
            for page in all_pages(store):
                advance(len(page.records))
                unreadable += len(page.unreadable)
                for record in page.records:
                    if record.successor is not None:
                        pointers += 1
                        continue
                    sessions += 1
                    size, age = len(record.payload), (now - record.created_at) // 1000
                    bytes_ += size
                    largest = max(largest, size)
                    sizes[max(6, (size - 1).bit_length())] += 1
                    ages[next((name for name, end in _AGES.items() if age <= end), _OLDER)] += 1
    figures = {
        "sessions": sessions,
        "bytes": bytes_,
        "bytes_average": round(bytes_ / sessions) if sessions else 0,
        "bytes_largest": largest,
        "rotated_away": pointers,
        "unreadable": unreadable,
    }
    histograms = {
        "bytes": {f"to {_bytes(1 << power)}": sizes[power] for power in _between(sizes)},
        "age": {name: ages[name] for name in (*_AGES, _OLDER)},
    }
    if as_json:
        click.echo(json.dumps({**figures, "histograms": histograms}, indent=2))
        return
    for label, value in figures.items():
        click.echo(f"{label.replace('_', ' '):<14} {value}")
    for name, histogram in histograms.items():
        click.echo()
        highest = max(histogram.values(), default=0) or 1
        table(
            [name, "sessions#", ""],
            [
                (label, str(count), "#" * -(-count * _BAR // highest))
                for label, count in histogram.items()
            ],
            drop=[""],
        )


def _between(counts: Counter[int]) -> range:
    return range(min(counts, default=0), max(counts, default=-1) + 1)


def _bytes(number: int) -> str:
    for unit, size in (("MB", 1 << 20), ("KB", 1 << 10)):
        if number >= size:
            return f"{number // size} {unit}"
    return f"{number} B"
