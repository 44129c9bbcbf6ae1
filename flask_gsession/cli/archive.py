"""``flask gsession export`` and ``import``: move sessions between stores."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import click
from flask.cli import with_appcontext

from ..moving.archive import BEGINNING, ArchiveError, Frame, read_items
from ..moving.exporting import Exporter
from ..moving.importing import Importer
from ..moving.private_file import private_file
from ..repository.scanning import Retry
from ..stores import Record
from ..stores.base import is_session_key
from ..stores.memory import MemoryStore
from ..values.envelope import NOT_ENCRYPTED
from .common import (
    choose_interface,
    estimate_count,
    file_is_missing,
    json_option,
    print_store,
    report_failures,
    require_scans,
    session_name,
    session_option,
)
from .output import pluralize, progress

_PIPE = Path("-")


@click.command("export", short_help="Write all sessions to a file.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True))
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@session_option
@with_appcontext
def export(file: Path, force: bool, cookie: str | None) -> None:
    """Write all sessions to FILE, or to standard output if FILE is "-".

    FILE holds the data of your users. Only its owner can read it, and it appears once it is
    complete. If a session changes during the export, FILE has its old or its new values.
    """
    interface = choose_interface(cookie)
    if file != _PIPE and file.exists() and not (force and file.is_file()):
        hint = "use --force to replace it" if file.is_file() else "it is not a regular file"
        raise click.UsageError(f"{file} exists: {hint}")
    print_store(interface)
    exporter = Exporter(interface.repository)
    with report_failures(
        interface, lambda: f"{pluralize(exporter.records, 'records')}; {file} not written"
    ):
        pages = exporter.pages(require_scans(interface))
        with (
            _output(file) as out,
            progress("export", partial(estimate_count, interface)) as advance,
        ):
            for number in exporter.write(pages, out):
                advance(number)
    written = pluralize(exporter.records, "records")
    click.echo(f"{session_name(interface)}: {written} exported", err=file == _PIPE)
    if exporter.unreadable:
        unreadable = pluralize(exporter.unreadable, "records")
        click.echo(f"Error: could not read {unreadable}; left out of the export", err=True)
    if exporter.incomplete:
        incomplete = pluralize(exporter.incomplete, "sessions")
        click.echo(f"Error: {incomplete} exported without a large value that is lost", err=True)
    sys.exit(bool(exporter.unreadable or exporter.incomplete))


@contextmanager
def _output(file: Path) -> Iterator[BinaryIO]:
    if file == _PIPE:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with private_file(file, BEGINNING, _report_leftover) as out:
            yield out
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from None


def _report_leftover(file: Path) -> None:
    click.echo(f"Removed {file}, left behind by an export that was killed", err=True)


@click.command("import", short_help="Import the sessions of an export.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True))
@click.option("--overwrite", is_flag=True, help="Replace sessions that changed since the export.")
@click.option("--skip-unreadable", is_flag=True, help="Leave out unreadable sessions.")
@click.option("--skip", type=click.IntRange(0), default=0, help="Skip this many records.")
@click.option("--dry-run", is_flag=True, help="Check FILE and the store, but import nothing.")
@session_option
@json_option
@with_appcontext
def import_(
    file: Path,
    overwrite: bool,
    skip_unreadable: bool,
    skip: int,
    dry_run: bool,
    cookie: str | None,
    as_json: bool,
) -> None:
    """Import the sessions in FILE, or from standard input if FILE is "-".

    Checks the whole FILE before it writes anything, and leaves out expired sessions. Sessions
    that the store already has stay as they are, so you can repeat an import safely.

    Protect FILE like the store: anyone who can change it can log in as any user.
    """
    interface = choose_interface(cookie)
    name = session_name(interface)
    done: Counter[str] = Counter()
    others: Counter[str] = Counter()  # marks and rosters
    users: Counter[str] = Counter()  # values of users
    print_store(interface)
    # Even a read would create a missing SQLite file.
    store = MemoryStore() if dry_run and file_is_missing(interface) else interface.store
    importer = Importer(interface.repository, store, overwrite=overwrite, dry_run=dry_run)

    def so_far() -> str:
        number = skip + done.total()
        return f"{pluralize(number, 'records')} (continue with --skip {number})" if done else ""

    with report_failures(interface, so_far), _input(file) as source:
        try:
            total = importer.check(source)
        except ArchiveError as error:
            raise ArchiveError(f"{error}; nothing was imported") from None
        if importer.problems and not skip_unreadable:
            raise ArchiveError(_summary(importer.problems, total))
        retry, number = Retry(), 0
        with progress("import", lambda: total) as advance:
            for item in read_items(source):
                # Before the sessions, which get entered in the rosters.
                if isinstance(item, Record) and importer.is_first(item):
                    others[retry(importer.put, item)] += 1
                    advance(1)
            advance(min(skip, total - others.total()))
            for item in read_items(source):
                if isinstance(item, Record) and is_session_key(item.key):
                    number += 1
                    if number > skip:
                        done[retry(importer.put, item)] += 1
                        advance(1)
                elif isinstance(item, Record) and not importer.is_first(item):
                    users[retry(importer.put, item)] += 1
                    advance(1)
                elif isinstance(item, Frame) and number >= skip:
                    retry(importer.put_frame, item)
    if as_json:
        report = {"session": name, "dry_run": dry_run, "records": done}
        more = {"users": users, "others": others}
        report |= {what: count for what, count in more.items() if count}
        click.echo(json.dumps(report, indent=2))
    else:
        would = "to be " if dry_run else ""
        parts = [f"{done['imported']} {would}imported"]
        parts += [f"{done[what]} {what}" for what in sorted(done) if what != "imported"]
        if users:
            parts.append(f"the values of {pluralize(users.total(), 'users')}")
        if others:
            parts.append(f"{pluralize(others.total(), 'records')} of old cookies")
        click.echo(f"{name}: {', '.join(parts)}")


@contextmanager
def _input(file: Path) -> Iterator[BinaryIO]:
    """Yield a file that can be read twice. An ``ArchiveError`` in the block ends the command."""
    try:
        if file == _PIPE:
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
                yield copy
        else:
            with file.open("rb") as source:
                yield source
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from None
    except ArchiveError as error:
        name = "standard input" if file == _PIPE else file
        raise click.ClickException(f"{name}: {error}") from None


def _summary(problems: Counter[str], total: int) -> str:
    reasons = ", ".join(f"{reason}: {number}" for reason, number in problems.items())
    if any(NOT_ENCRYPTED in reason for reason in problems):
        advice = 'To accept unencrypted sessions, end SESSION_ENCRYPTION_KEYS with "plain"'
    else:
        advice = "Add the missing key to SESSION_ENCRYPTION_KEYS"
    return (
        f"can't read {problems.total()} of {pluralize(total, 'records')} ({reasons}); nothing was "
        f"imported. {advice}, or use --skip-unreadable to leave them out"
    )
