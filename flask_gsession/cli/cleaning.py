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
    choose_interface,
    estimate_count,
    file_is_missing,
    interfaces,
    json_option,
    print_store,
    report_failures,
    session_name,
    session_option,
)
from .output import pluralize, progress

# The kinds that are repaired instead of removed.
_REPAIRED = dict.fromkeys(("sessions without expiry", "large values without expiry"), "given one")


@click.command(short_help="Remove expired sessions and leftovers of crashes.")
@click.option(
    "--batch",
    type=click.IntRange(1, 10_000),
    default=1000,
    show_default=True,
    help="How many items to examine in one step.",
)
@click.option("--dry-run", is_flag=True, help="Count leftovers, but remove nothing.")
@click.option("--cursor", default="", help="Continue an interrupted clean-up.")
@session_option
@json_option
@with_appcontext
def cleanup(batch: int, dry_run: bool, cursor: str, cookie: str | None, as_json: bool) -> None:
    """Remove expired sessions and leftovers of crashed processes.

    Works in small steps. You can interrupt it at any time; run it again to finish.
    """
    interfaces_ = [choose_interface(cookie)] if cookie or cursor else list(interfaces().values())
    rows: list[dict[str, object]] = []
    failed = False
    try:
        for interface in interfaces_:
            found: Counter[str] = Counter()
            row = {"session": session_name(interface), "dry_run": dry_run, "found": found}
            rows.append(row)
            try:
                _clean(interface, batch, dry_run, cursor, as_json, found)
            except click.UsageError:
                rows.clear()
                raise
            except click.ClickException as error:  # continue with the other stores
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
    name, files = session_name(interface), interface.repository.files
    upkeep = parts_of(interface.store).upkeep
    print_store(interface)
    if file_is_missing(interface):
        text = "nothing to do: the file does not exist yet"
    elif upkeep is None and files is None:
        text = "nothing to do: this store removes expired sessions itself"
    else:

        def so_far() -> str:
            hint = f" (continue with --cursor {cursor})" if cursor not in ("", MORE) else ""
            return f"{_text(found, dry_run)}{hint}"

        with (
            report_failures(interface, so_far),
            progress(f"{name}: clean-up", partial(_estimate_items, interface, batch)) as advance,
        ):
            try:
                for step in steps(upkeep, batch, cursor, dry_run=dry_run):
                    found.update(step.found)
                    cursor = step.cursor
                    advance(step.seen)
                for step in steps(files, batch, dry_run=dry_run):
                    found.update(step.found)
                    advance(step.seen)
            except ValueError as error:  # a malformed cursor
                raise click.UsageError(str(error)) from None
        text = _text(found, dry_run)
    if not quiet:
        click.echo(f"{name}: {text}")


def _estimate_items(interface: GSessionInterface, batch: int) -> int | None:
    """Roughly how many items a clean-up examines, or None if the store can't estimate it."""
    first = next(steps(parts_of(interface.store).upkeep, batch, dry_run=True), None)
    if first is not None and not first.cursor:
        return first.seen
    return estimate_count(interface)


def _text(found: Counter[str], dry_run: bool) -> str:
    """The counts in words, always with the number of expired sessions."""
    parts = []
    for kind, number in {"expired sessions": 0, **found}.items():
        if number or kind == "expired sessions":
            done = _REPAIRED.get(kind, "removed")
            parts.append(f"{pluralize(number, kind)} {f'to be {done}' if dry_run else done}")
    return ", ".join(parts)
