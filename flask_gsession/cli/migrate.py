"""``flask gsession migrate``: take over the old sessions of Flask-Session offline."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice

import click
from flask.cli import with_appcontext

from ..errors import StoreUnavailable
from ..interface import GSessionInterface
from ..moving.flask_session import LABEL, FlaskSessionSource
from ..moving.migrating import TAKEN_OVER, Migration
from ..moving.pickle_process import PickleProcess
from ..moving.takeover import Takeover
from ..repository.repository import Repository
from ..repository.scanning import Retry
from ..stores.memory import MemoryStore
from .common import (
    choose_interface,
    file_is_missing,
    format_time,
    json_option,
    print_store,
    report_failures,
    session_name,
    session_option,
    store_location,
    without_journal,
)
from .output import pluralize, progress

_NOTHING_FOUND = (
    "no old sessions found: if there are any, check SESSION_TYPE, its server, database and table, "
    "SESSION_KEY_PREFIX and SESSION_ID_LENGTH"
)


@click.command(short_help="Take over old sessions of Flask-Session.")
@click.option("--from", "label", type=click.Choice([LABEL]), required=True, help="Their library.")
@click.option("--url", help="Their location, if it differs from the settings.")
@click.option("--pickle", is_flag=True, help="Also read pickles with dates, decimals and UUIDs.")
@click.option("--dry-run", is_flag=True, help="Show what it would do, but write nothing.")
@click.option("--check", is_flag=True, help="Check the settings and a sample; write nothing.")
@click.option("--sample", type=click.IntRange(1), default=1000, help="Sessions to --check.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@session_option
@json_option
@with_appcontext
def migrate(
    label: str,
    url: str | None,
    pickle: bool,
    dry_run: bool,
    check: bool,
    sample: int,
    yes: bool,
    cookie: str | None,
    as_json: bool,
) -> None:
    """Take over old sessions of Flask-Session without waiting for their users.

    A browser's old cookie then leads to the new session. The old sessions stay where they are.
    Skips sessions that it has taken over before, so you can run it again at any time.

    Exits with 1 if a session can't be taken over or loses a value, or if there are no old sessions.
    """
    interface = choose_interface(cookie)
    takeover, source = _source(interface, label, url)
    names = _names(source)
    print_store(interface)
    writes = not (dry_run or check)
    if writes and not yes:
        click.confirm(
            f"Take over all old sessions into {session_name(interface)!r} in "
            f"{store_location(interface)}?",
            abort=True,
        )
    with ExitStack() as stack:
        migration = Migration(
            _repository(interface, writes),
            takeover,
            source,
            pickles=stack.enter_context(PickleProcess()) if pickle else None,
            dry_run=not writes,
        )
        with report_failures(interface, lambda: _counts(migration)):
            retry = Retry()
            with progress("migrate", lambda: None) as advance:
                for name in islice(names, sample if check else None):
                    retry(migration.take_over, name)
                    advance(1)
    problems = [] if migration.outcomes else [_NOTHING_FOUND]
    if check:
        problems += _problems(interface, takeover, migration)
    if as_json:
        found = {
            "session": session_name(interface),
            "dry_run": not writes,
            "sessions": migration.outcomes,
            "dropped": migration.dropped,
            "problems": problems,
        }
        click.echo(json.dumps(found, indent=2))
    else:
        _print(interface, migration, problems, writes)
    sys.exit(bool(migration.lost or migration.dropped or problems))


def _source(
    interface: GSessionInterface, label: str, url: str | None
) -> tuple[Takeover, FlaskSessionSource]:
    takeover = interface.repository.imports
    source = takeover.source(label, url) if isinstance(takeover, Takeover) else None
    if not isinstance(takeover, Takeover) or not isinstance(source, FlaskSessionSource):
        raise click.ClickException(
            f"{session_name(interface)}: the import of old sessions is off, so their cookies would "
            "not work: set SESSION_TYPE and the other settings of Flask-Session"
        )
    if takeover.is_over(interface.repository.now()):
        raise click.ClickException(
            f"{session_name(interface)}: SESSION_IMPORT_UNTIL has passed, so old cookies don't "
            "work any more: set a later date"
        )
    return takeover, source


def _repository(interface: GSessionInterface, writes: bool) -> Repository:
    repository = interface.repository
    if writes or not file_is_missing(interface):
        return repository
    # Even a read would create a missing SQLite file.
    return Repository(
        repository.settings, repository.live, MemoryStore(), repository.events, repository.clock
    )


def _names(source: FlaskSessionSource) -> Iterator[str]:
    try:
        return _found(source.names())
    except NotImplementedError:
        raise click.ClickException(
            "the old sessions are files named by a hash of their ids, so they can't be listed. "
            "Each is taken over by its user's next request, but not by this command"
        ) from None


def _found(names: Iterator[str]) -> Iterator[str]:
    try:
        yield from names
    except StoreUnavailable as error:
        raise StoreUnavailable(f"the old sessions can't be listed: {error}") from None


def _problems(interface: GSessionInterface, takeover: Takeover, migration: Migration) -> list[str]:
    """Problems with the settings, in addition to the counted losses."""
    problems = []
    if isinstance(without_journal(interface), MemoryStore):
        problems.append("SESSION_STORE is a memory store: sessions end with each process")
    else:
        try:
            if not file_is_missing(interface):
                interface.store.load("A" * 43)
        except StoreUnavailable as error:
            problems.append(f"SESSION_STORE can't be reached: {error}")
    if takeover.until is None:
        problems.append("SESSION_IMPORT_UNTIL is not set, so the import never ends")
    elif migration.latest_end > takeover.until:
        problems.append(
            f"SESSION_IMPORT_UNTIL is {format_time(takeover.until)}, and old sessions last until "
            f"{format_time(migration.latest_end)}: users who come back in between must log in again"
        )
    return problems


def _counts(migration: Migration) -> str:
    counts = sorted(migration.outcomes.items(), key=lambda each: (each[0] != TAKEN_OVER, each[0]))
    return ", ".join(f"{number} {outcome}" for outcome, number in counts)


def _print(
    interface: GSessionInterface, migration: Migration, problems: list[str], writes: bool
) -> None:
    name = session_name(interface)
    would = "" if writes else "to be "
    if TAKEN_OVER not in migration.outcomes:
        migration.outcomes[TAKEN_OVER] = 0
    click.echo(f"{name}: {migration.outcomes[TAKEN_OVER]} {would}{TAKEN_OVER}", nl=False)
    rest = sorted(each for each in migration.outcomes if each != TAKEN_OVER)
    click.echo("".join(f", {migration.outcomes[each]} {each}" for each in rest))
    for key, number in sorted(migration.dropped.items()):
        click.echo(f"{name}: session[{key}] can't be kept in {pluralize(number, 'sessions')}")
    for problem in problems:
        click.echo(f"{name}: {problem}")
    if not writes:
        imports = interface.repository.imports
        assert isinstance(imports, Takeover)
        until = "no end" if imports.until is None else format_time(imports.until)
        click.echo(f"{name}: the old cookie is {imports.cookie.name}, read until {until}")
