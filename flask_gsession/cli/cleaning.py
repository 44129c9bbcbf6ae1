"""``flask gsession cleanup``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import partial

import click
from flask.cli import with_appcontext

from ..interface import GSessionInterface
from ..operate.cleanup import steps
from ..stores.parts import MORE, parts_of
from .common import (
    about,
    chosen,
    interfaces,
    json_option,
    name_of,
    name_store,
    not_there_yet,
    session_option,
    told,
)
from .output import counted, progress

# Of what is not removed.
_DONE = dict.fromkeys(("sessions without expiry", "large values without expiry"), "given one")


@click.command(short_help="Remove expired sessions, and what crashes left behind.")
@click.option(
    "--batch",
    type=click.IntRange(1, 10_000),
    default=1000,
    show_default=True,
    help="How many to look at in one step.",
)
@click.option("--dry-run", is_flag=True, help="Count what would be removed, and remove nothing.")
@click.option("--cursor", default="", help="Go on where an earlier clean-up was interrupted.")
@session_option
@json_option
@with_appcontext
def cleanup(batch: int, dry_run: bool, cursor: str, cookie: str | None, as_json: bool) -> None:
    """Remove what nobody reads any more: expired sessions, and what crashes left behind.

    Each batch is a step of its own: interrupted, it has removed what it says, and goes on when it
    is called again.
    """
    interfaces_ = [chosen(cookie)] if cookie or cursor else list(interfaces().values())
    rows: list[dict[str, object]] = []
    failed = False
    try:
        for interface in interfaces_:
            found: Counter[str] = Counter()
            row = {"session": name_of(interface), "dry_run": dry_run, "found": found}
            rows.append(row)
            try:
                _clean(interface, batch, dry_run, cursor, as_json, found)
            except click.UsageError:
                rows.clear()
                raise
            except click.ClickException as error:  # the others have nothing to do with it
                error.show()
                row["error"] = error.message
                failed = True
    finally:
        if as_json and rows:
            click.echo(json.dumps(rows, indent=2))
    sys.exit(failed)


def _clean(
    interface: GSessionInterface,
    batch: int,
    dry_run: bool,
    cursor: str,
    quiet: bool,
    found: Counter[str],
) -> None:
    name, files = name_of(interface), interface.repository.files
    upkeep = parts_of(interface.store).upkeep
    name_store(interface)
    if not_there_yet(interface):
        text = "nothing to do, its file is not there yet"
    elif upkeep is None and files is None:
        text = "nothing to do, this store lets go of expired sessions itself"
    else:

        def so_far() -> str:
            go_on = f" (--cursor {cursor} goes on from there)" if cursor not in ("", MORE) else ""
            return f"{_text(found, dry_run)}{go_on}"

        with (
            told(interface, so_far),
            progress(f"{name}: clean-up", partial(_to_look_at, interface, batch)) as advance,
        ):
            try:
                for step in steps(upkeep, batch, cursor, dry_run=dry_run):
                    found.update(step.found)
                    cursor = step.cursor
                    advance(step.seen)
                for step in steps(files, batch, dry_run=dry_run):
                    found.update(step.found)
                    advance(step.seen)
            except ValueError as error:  # of a cursor
                raise click.UsageError(str(error)) from None
        text = _text(found, dry_run)
    if not quiet:
        click.echo(f"{name}: {text}")


def _to_look_at(interface: GSessionInterface, batch: int) -> int | None:
    """How many things a clean-up sees, more or less; None where the store cannot say.

    Where one step counts them all, those that are found; else there are sessions among them.
    """
    first = next(steps(parts_of(interface.store).upkeep, batch, dry_run=True), None)
    if first is not None and not first.cursor:
        return first.seen
    return about(interface)


def _text(found: Counter[str], dry_run: bool) -> str:
    """What was found, in words; always how many expired sessions there were."""
    parts = []
    for kind, number in {"expired sessions": 0, **found}.items():
        if number or kind == "expired sessions":
            done = _DONE.get(kind, "removed")
            parts.append(f"{counted(number, kind)} {f'to be {done}' if dry_run else done}")
    return ", ".join(parts)
