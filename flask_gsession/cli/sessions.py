"""``flask gsession list`` and ``show``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Container, Iterator
from functools import partial
from heapq import nsmallest
from itertools import islice

import click
from flask.cli import with_appcontext

from ..errors import UnreadableRecord
from ..interface import GSessionInterface
from ..repository.permanent import is_permanent
from ..repository.repository import Repository
from ..repository.scanning import all_pages
from ..stores import Record
from ..stores.base import unexpired
from ..values.marks import expired, split
from ..values.references import BYTES, reference_in, refers
from ..watching.redaction import shown_name, shown_value
from .common import (
    HANDLE_ARGUMENT,
    NO_SESSION,
    Facts,
    choose_interface,
    estimate_count,
    facts_of,
    format_duration,
    format_time,
    json_option,
    printable,
    prints_to_terminal,
    report_failures,
    require_scans,
    resolve_handle,
    session_name,
    session_option,
    store_location,
)
from .output import pluralize, progress, table
from .users import device_facts, in_one_line, list_devices
from .where import Condition, NotCompared, Where, all_hold

_SHOWN = 100  # sessions, on a terminal
_LARGE = "<large>"  # shown for a value that is not loaded
_UNREADABLE = "could not be read"
UNSORTED = "none"
_ORDERS: dict[str, Callable[[Facts], tuple[int | str, ...]]] = {
    "newest": lambda facts: (-facts.created_at, facts.handle),
    "oldest": lambda facts: (facts.created_at, facts.handle),
    "idle": lambda facts: (facts.idle_expires_at, facts.handle),
    "end": lambda facts: (facts.absolute_expires_at, facts.handle),
    "bytes": lambda facts: (-facts.bytes, facts.handle),
    "handle": lambda facts: (facts.handle,),
}


@click.command("list", short_help="List sessions.")
@click.option("--limit", type=click.IntRange(1), help="How many (100 on a terminal, else all).")
@click.option(
    "--where",
    "conditions",
    type=Where(),
    metavar="KEY=VALUE",
    multiple=True,
    help="Only sessions with this value. Repeat it to combine conditions.",
)
@click.option(
    "--sort",
    type=click.Choice([*_ORDERS, UNSORTED]),
    help=f'The order. Defaults to "newest" on a terminal, else "{UNSORTED}".',
)
@click.option("--user", metavar="USER", help="Only the sessions that are bound to this user.")
@session_option
@json_option
@with_appcontext
def list_(
    limit: int | None,
    conditions: tuple[Condition, ...],
    sort: str | None,
    user: str | None,
    cookie: str | None,
    as_json: bool,
) -> None:
    """List sessions.

    In a pipe, each line has the handle, the creation time, the ends of the idle and the absolute
    timeout, and the size in bytes. With --json, each line is an object.

    KEY is a key of the session or a path into its value, such as prefs.theme or cart.0.sku. VALUE
    is the text of a string, number, date or UUID, or JSON: 42, true, null, '["mug"]'.

    With --user, each line has the handle, the id of the device, the times of sign-in, last use and
    end, the network, and the label.
    """
    if user is not None and (conditions or sort):
        raise click.UsageError("--user can't be combined with --where or --sort")
    interface = choose_interface(cookie)
    if user is not None:
        list_devices(interface, user, limit, as_json)
        return
    on_terminal = prints_to_terminal() and not as_json
    if limit is None and on_terminal:
        limit = _SHOWN
    if sort is None:
        sort = "newest" if on_terminal else UNSORTED
    listed = 0
    skipped: Counter[str] = Counter()

    with report_failures(interface, lambda: pluralize(listed, "sessions")):
        most = None if limit is None else limit + 1  # one more, to see if there are more
        found = _found(interface, conditions, skipped)
        if sort != UNSORTED:
            found = iter(_sorted(interface, found, sort, most))
        shown = islice(found, limit)
        if on_terminal:
            now = interface.repository.now()
            cells = [_row(facts, now) for facts in shown]
            listed = len(cells)
            if cells:
                columns = ["handle", "age", "idles out in", "ends in", "bytes#"]
                table(columns, cells, drop=["ends in", "age", "idles out in", "bytes"])
        else:
            for facts in shown:
                fields = printable(facts)
                text = json.dumps(fields) if as_json else " ".join(map(str, fields.values()))
                click.echo(text)
                listed += 1
        more = limit is not None and next(found, None) is not None
    if more:
        click.echo(f"There are more than {limit}: use --limit to show more", err=True)
    if not listed and not skipped:
        none = "no matching sessions" if conditions else "no sessions"
        click.echo(f"{session_name(interface)}: {none} in {store_location(interface)}", err=True)
    for why, number in skipped.items():
        click.echo(f"{number} more {why}", err=True)


def _found(
    interface: GSessionInterface, conditions: tuple[Condition, ...], skipped: Counter[str]
) -> Iterator[Facts]:
    """The sessions that meet all conditions. Counts in ``skipped`` those that can't be compared."""
    for page in all_pages(require_scans(interface)):
        if page.unreadable:
            skipped[_UNREADABLE] += len(page.unreadable)
        for record in page.records:
            if record.successor is not None:
                continue
            try:
                if all_hold(interface.repository, record, conditions):
                    yield facts_of(record)
            except UnreadableRecord:
                skipped[_UNREADABLE] += 1
            except NotCompared:
                skipped["not compared: the value of that key is a large value"] += 1


def _sorted(
    interface: GSessionInterface, found: Iterator[Facts], sort: str, most: int | None
) -> list[Facts]:
    """The first ``most`` sessions in this order. Keeps only these in memory."""
    order = _ORDERS[sort]
    with progress("reading sessions", partial(estimate_count, interface)) as advance:

        def counting() -> Iterator[Facts]:
            for facts in found:
                advance(1)
                yield facts

        return sorted(counting(), key=order) if most is None else nsmallest(most, counting(), order)


def _row(facts: Facts, now: int) -> tuple[str, ...]:
    return (
        facts.handle,
        format_duration(now - facts.created_at),
        format_duration(facts.idle_expires_at - now),
        format_duration(facts.absolute_expires_at - now),
        str(facts.bytes),
    )


@click.command(context_settings=HANDLE_ARGUMENT, short_help="Show one session and its keys.")
@click.argument("handle")
@click.option("--values", is_flag=True, help="Show types, and the values in SESSION_DEBUG_SHOW.")
@session_option
@json_option
@with_appcontext
def show(handle: str, values: bool, cookie: str | None, as_json: bool) -> None:
    """Show the times of one session, and its keys with their sizes.

    HANDLE may be its first eight or more characters if they are unique.

    With --values, also show the type of each value. You see the value itself only if
    SESSION_DEBUG_SHOW names the key and nothing in it looks like a secret. Large values stay
    hidden.
    """
    interface = choose_interface(cookie)
    repository = interface.repository
    loaded, problem = None, ""
    with report_failures(interface):
        key = resolve_handle(interface, handle)
        try:
            loaded = repository.find(key)
            record = loaded.record if loaded else None
        except UnreadableRecord as error:
            problem = f"{key}: unreadable: {error}"
            try:
                record = unexpired(interface.store, key, repository.now())
            except UnreadableRecord:
                record = None
    if record is None:
        raise click.ClickException(problem or f"{key}: {NO_SESSION}")
    facts = printable(facts_of(record))
    if record.key != key:
        facts["rotated_from"] = key
    contents: dict[str, dict[str, object]] = {}
    now, until = repository.now(), 0
    if loaded is not None:
        facts["permanent"] = is_permanent(loaded.body.values)
        until = loaded.body.debug_until or 0
        facts["debug_log_until"] = format_time(until) if until > now else None
        try:
            facts |= device_facts(interface, loaded.body.owner)
        except click.ClickException as error:
            problem = error.message
        for name, raw in loaded.body.values.items():
            if expired(raw, now):
                continue
            expires_at = split(raw)[0].expires_at
            contents[_label(name, contents)] = {
                "bytes": reference_in(raw).length if refers(raw) else len(raw),
                "expires_at": format_time(expires_at) if expires_at else None,
                **(_value(repository, name, raw) if values else {}),
            }
    if as_json:
        click.echo(json.dumps({**facts, "keys": contents}, indent=2))
    else:
        _print(facts, contents, record, until, now)
    if problem:
        raise click.ClickException(problem)


def _value(repository: Repository, name: str, raw: bytes) -> dict[str, object]:
    """The type of a value (None if unknown), and as much of the value as may be shown."""
    if refers(raw):
        return {"type": "bytes" if reference_in(raw).kind == BYTES else None, "value": _LARGE}
    try:
        value = repository.codec.decode(split(raw)[1])
    except UnreadableRecord:
        return {"type": None, "value": "<unreadable>"}
    return {
        "type": type(value).__name__,
        "value": shown_value(name, value, repository.settings.debug_show),
    }


def _label(name: str, taken: Container[str]) -> str:
    """A unique label for a key. Some packages put a secret into the name itself."""
    shown = label = shown_name(name)
    number = 1
    while label in taken:
        number += 1
        label = f"{shown} ({number})"
    return label


def _print(
    facts: dict[str, object],
    contents: dict[str, dict[str, object]],
    record: Record,
    until: int,
    now: int,
) -> None:
    notes = {
        "created_at": f"{format_duration(now - record.created_at)} ago",
        "idle_expires_at": f"in {format_duration(record.idle_expires_at - now)}",
        "absolute_expires_at": f"in {format_duration(record.absolute_expires_at - now)}",
        "debug_log_until": f"in {format_duration(until - now)}",
    }
    for label, value in facts.items():
        note = f" ({notes[label]})" if label in notes else ""
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or None
        if value is not None:
            click.echo(f"{label:<20} {in_one_line(str(value))}{note}")
    if contents:
        click.echo()
        rows = [
            (
                name,
                str(each["bytes"]),
                str(each["expires_at"] or "with the session"),
                *(str(each[fact] or "") for fact in ("type", "value") if fact in each),
            )
            for name, each in contents.items()
        ]
        columns = ["key", "bytes#", "expires_at", "type", "value"]
        columns = columns[: len(rows[0])]
        drop = [name for name in ("expires_at", "type") if name in columns]
        table(columns, rows, wraps=["key", "value"], drop=drop)
