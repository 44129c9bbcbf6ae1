"""``flask gsession list``, ``show``, ``revoke`` and ``stats``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator
from functools import partial
from heapq import nsmallest
from itertools import islice
from typing import NoReturn

import click
from flask.cli import with_appcontext

from ..errors import LogoutUnconfirmed, UnreadableRecord
from ..events import SessionRevoked
from ..interface import GSessionInterface
from ..repository.repository import Repository
from ..repository.scanning import all_pages
from ..stores import Record
from ..stores.base import unexpired
from ..values.marks import expired, split
from ..values.references import BYTES, reference_in, refers
from ..watching.redaction import shown_name, shown_value
from .common import (
    NO_SESSION,
    Facts,
    about,
    chosen,
    described,
    facts_of,
    is_terminal,
    json_option,
    key_of,
    moment,
    name_of,
    name_store,
    place,
    scanned,
    session_option,
    span,
    told,
)
from .output import counted, progress, table
from .where import Condition, NotCompared, Where, all_hold

_SHOWN = 100  # sessions, on a terminal
_AGES = {"to 1 hour": 3600, "to 1 day": 86400, "to 7 days": 7 * 86400, "to 30 days": 30 * 86400}
_OLDER = "older"
_LARGE = "<large>"  # a value that is not loaded
_BAR = 40  # characters
_ROUNDS = 20  # through the sessions, at most, to end them all
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
# A handle may begin with a hyphen.
_HANDLES = {"ignore_unknown_options": True}


@click.command("list", short_help="List the sessions there are.")
@click.option("--limit", type=click.IntRange(1), help="How many (100 on a terminal, else all).")
@click.option(
    "--where",
    "conditions",
    type=Where(),
    metavar="KEY=VALUE",
    multiple=True,
    help="Only sessions with this value; repeat it for sessions that meet all conditions.",
)
@click.option(
    "--sort",
    type=click.Choice([*_ORDERS, UNSORTED]),
    help="By what: the newest, largest or first to end comes first "
    f'("newest" on a terminal, else "{UNSORTED}").',
)
@session_option
@json_option
@with_appcontext
def list_(
    limit: int | None,
    conditions: tuple[Condition, ...],
    sort: str | None,
    cookie: str | None,
    as_json: bool,
) -> None:
    """List the sessions there are.

    In a pipe each line has the handle, when the session was created, when its idle and its
    absolute timeout end it, and its bytes. With --json it is an object.

    KEY is a key of the session, or leads into it: prefs.theme, cart.0.sku. VALUE is the text of a
    string, number, date or UUID, or JSON: 42, true, null, '["mug"]'.
    """
    interface = chosen(cookie)
    on_terminal = is_terminal() and not as_json
    if limit is None and on_terminal:
        limit = _SHOWN
    if sort is None:
        sort = "newest" if on_terminal else UNSORTED
    listed = 0
    skipped: Counter[str] = Counter()

    with told(interface, lambda: counted(listed, "sessions")):
        # One more than is shown tells whether there are more.
        most = None if limit is None else limit + 1
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
                fields = described(facts)
                text = json.dumps(fields) if as_json else " ".join(map(str, fields.values()))
                click.echo(text)
                listed += 1
        more = limit is not None and next(found, None) is not None
    if more:
        click.echo(f"There are more than {limit}: --limit says how many to show", err=True)
    if not listed and not skipped:
        none = "no such sessions" if conditions else "no sessions"
        click.echo(f"{name_of(interface)}: {none} in {place(interface)}", err=True)
    for why, number in skipped.items():
        click.echo(f"{number} more {why}", err=True)


def _found(
    interface: GSessionInterface, conditions: tuple[Condition, ...], skipped: Counter[str]
) -> Iterator[Facts]:
    """The sessions that meet all conditions; counts those that cannot be judged."""
    for page in all_pages(scanned(interface)):
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
                skipped["have a large value under that key, which is not compared"] += 1


def _sorted(
    interface: GSessionInterface, found: Iterator[Facts], sort: str, most: int | None
) -> list[Facts]:
    """The first of all sessions in this order. Holds no more than ``most`` of them in memory."""
    order = _ORDERS[sort]
    with progress("reading sessions", partial(about, interface)) as advance:

        def counting() -> Iterator[Facts]:
            for facts in found:
                advance(1)
                yield facts

        return sorted(counting(), key=order) if most is None else nsmallest(most, counting(), order)


def _row(facts: Facts, now: int) -> tuple[str, ...]:
    return (
        facts.handle,
        span(now - facts.created_at),
        span(facts.idle_expires_at - now),
        span(facts.absolute_expires_at - now),
        str(facts.bytes),
    )


@click.command(context_settings=_HANDLES, short_help="Show one session, and what keys are in it.")
@click.argument("handle")
@click.option("--values", is_flag=True, help="Also the values of the keys in SESSION_DEBUG_SHOW.")
@session_option
@json_option
@with_appcontext
def show(handle: str, values: bool, cookie: str | None, as_json: bool) -> None:
    """Show one session: its times, and the keys in it with their sizes.

    Of HANDLE the first eight or more characters are enough, where no other begins with them. With
    --values of each key the type too, and the value where SESSION_DEBUG_SHOW names the key and
    neither it nor what is in it looks like a secret. Large values are not loaded.
    """
    interface = chosen(cookie)
    repository = interface.repository
    loaded, problem = None, ""
    with told(interface):
        key = key_of(interface, handle)
        try:
            loaded = repository.find(key)
            record = loaded.record if loaded else None
        except UnreadableRecord as error:
            problem = f"{key}: what is in it cannot be read: {error}"
            try:
                record = unexpired(interface.store, key, repository.now())
            except UnreadableRecord:
                record = None
    if record is None:
        raise click.ClickException(problem or f"{key}: {NO_SESSION}")
    facts = described(facts_of(record))
    if record.key != key:
        facts["rotated_from"] = key
    contents: dict[str, dict[str, object]] = {}
    now, until = repository.now(), 0
    if loaded is not None:
        facts["permanent"] = repository.is_permanent(loaded.body.values)
        until = loaded.body.debug_until or 0
        facts["debug_log_until"] = moment(until) if until > now else None
        for name, raw in loaded.body.values.items():
            if expired(raw, now):
                continue
            expires_at = split(raw)[0].expires_at
            contents[_label(name, contents)] = {
                "bytes": reference_in(raw).length if refers(raw) else len(raw),
                "expires_at": moment(expires_at) if expires_at else None,
                **(_value(repository, name, raw) if values else {}),
            }
    if as_json:
        click.echo(json.dumps({**facts, "keys": contents}, indent=2))
    else:
        _print(facts, contents, record, until, now)
    if problem:
        raise click.ClickException(problem)


def _value(repository: Repository, name: str, raw: bytes) -> dict[str, object]:
    """The type of a value, None where it is not known; and itself, as far as it may be shown."""
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
    """What a key is called here: some packages put a secret into the very name."""
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
        "created_at": f"{span(now - record.created_at)} ago",
        "idle_expires_at": f"in {span(record.idle_expires_at - now)}",
        "absolute_expires_at": f"in {span(record.absolute_expires_at - now)}",
        "debug_log_until": f"in {span(until - now)}",
    }
    for label, value in facts.items():
        note = f" ({notes[label]})" if label in notes else ""
        if value is not None:
            click.echo(f"{label:<20} {value}{note}")
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


@click.command(context_settings=_HANDLES, short_help="End sessions from outside.")
@click.argument("handles", metavar="[HANDLE...]", nargs=-1)
@click.option("--all", "everybody", is_flag=True, help="Every session there is; asks first.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@session_option
@with_appcontext
def revoke(handles: tuple[str, ...], everybody: bool, yes: bool, cookie: str | None) -> None:
    """End sessions from outside: their tokens lead nowhere from now on.

    The exit status is 1 where a handle led to no session, or something else was not well. A handle
    from before a rotation will do for as long as its token does.
    """
    if everybody == bool(handles):
        raise click.UsageError("Name the handles, or --all")
    interface = chosen(cookie)
    if everybody:
        _revoke_all(interface, yes)
    ended, problems = 0, []
    with told(interface, lambda: counted(ended, "sessions") + " ended"):
        for handle in handles:
            key = key_of(interface, handle)
            done, problem = _end(interface, key)
            ended += done
            if problem:
                problems.append(f"{key}: {problem}")
            else:
                click.echo(f"{key}: ended")
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    sys.exit(bool(problems))


def _revoke_all(interface: GSessionInterface, yes: bool) -> NoReturn:
    store = scanned(interface)
    name_store(interface)
    ended = 0
    problems: Counter[str] = Counter()
    where = f"of {name_of(interface)!r} in {place(interface)}"
    if not yes:
        number = about(interface)
        whose = "every session" if number is None else f"about {counted(number, 'sessions')}"
        click.confirm(f"End {whose} {where}?", abort=True)
    begun = interface.repository.now()
    with (
        told(interface, lambda: counted(ended, "sessions") + " ended"),
        progress("ending sessions", partial(about, interface)) as advance,
    ):
        for again in range(_ROUNDS):
            before = ended
            for page in all_pages(store):
                keys = [] if again else list(page.unreadable)
                # Rotated meanwhile, a session may have got past: it is as old as it was.
                keys += [
                    record.key for record in page.records if not again or record.created_at <= begun
                ]
                for key in keys:
                    done, problem = _end(interface, key)
                    ended += done
                    problems[problem] += 1
                advance(0 if again else len(page.records))
            if ended == before:
                break
        else:
            problems["sessions are rotated faster than they can be ended: call it again"] = 1
    del problems[""], problems[NO_SESSION]  # of a pointer whose session has ended
    click.echo(f"{counted(ended, 'sessions')} ended")
    for problem, number in problems.items():
        click.echo(f"Error: {counted(number, 'times')}: {problem}", err=True)
    sys.exit(bool(problems))


def _end(interface: GSessionInterface, key: str) -> tuple[bool, str]:
    """Whether there was a session, which has ended now; and what was not well."""
    problem = ""
    try:
        ended = interface.repository.delete(key)
    except LogoutUnconfirmed as error:
        ended, problem = True, f"ended, but {error}"
    except UnreadableRecord as error:
        return False, f"what is in it cannot be read: {error}"
    if not ended:
        return False, NO_SESSION
    interface.repository.events.emit(SessionRevoked, key)
    return True, problem


@click.command(short_help="Count the sessions: how many, how large, how old.")
@session_option
@json_option
@with_appcontext
def stats(cookie: str | None, as_json: bool) -> None:
    """Count the sessions there are, how large and how old they are."""
    interface = chosen(cookie)
    name_store(interface)
    now = interface.repository.now()
    ages: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    sessions = bytes_ = largest = pointers = unreadable = 0
    with told(interface):
        store = scanned(interface)
        with progress("counting", partial(about, interface)) as advance:
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
