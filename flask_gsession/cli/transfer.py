"""``flask gsession export`` and ``import``: sessions as lines of JSON, to move them between stores.

The first line says what the file is; the last one how many records are between them, and the
SHA-256 of all that is before it. A record keeps its key, version and times, and its payload as the
store had it: an encrypted one stays encrypted, and is of use only where the same key is known. The
frames of its large values are lines before it.

``import`` checks each line as if a stranger had written it: names and keys have their usual form,
sessions end where this application's own would, and a large value belongs to the session behind it.
It can't check the values of a session: whoever could write the file chose them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import click
import msgspec
from flask.cli import with_appcontext

from ..errors import Gone, KeyTaken, Stale, UnreadableRecord, ValueLost
from ..interface import GSessionInterface
from ..repository.repository import BLOB_GRACE, Repository
from ..stores import Record, file_locks
from ..stores.base import is_session_key, unexpired
from ..stores.rights import NO_FOLLOW, NO_WAIT
from ..values.large_values import stored_length
from ..values.marks import END_OF_TIME
from ..values.payload import NOT_ENCRYPTED, Body
from ..values.references import reference_in, refers
from .common import (
    Patience,
    about,
    chosen,
    json_option,
    moment,
    name_of,
    name_store,
    not_there_yet,
    pages,
    scanned,
    session_option,
    told,
)
from .output import counted, progress

_FORMAT = 1
_LONGEST = 32 * 1024 * 1024  # bytes of a line
_BEGIN, _LAST, _FRAME = b'{"flask_gsession"', b'{"records"', b'{"blob"'
_PIPE = "-"
_PART = ".part"


class _First(msgspec.Struct):
    flask_gsession: int
    session: str
    exported_at: str


# A pattern of msgspec is searched for; "$" would let a line break pass.
_Key = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{43}\Z")]
_Blob = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
_Version = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
_Time = Annotated[int, msgspec.Meta(ge=0, lt=END_OF_TIME)]


class _Row(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    key: _Key
    version: _Version
    created_at: _Time
    idle_expires_at: _Time
    absolute_expires_at: _Time
    payload: Annotated[bytes, msgspec.Meta(max_length=16 * 1024 * 1024)]  # as base64
    successor: _Key | None = None

    def __repr__(self) -> str:
        return f"<_Row {self.key}: {len(self.payload)} bytes>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("key", self.key)]


class _Frame(msgspec.Struct, forbid_unknown_fields=True):
    blob: _Blob
    offset: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    frame: Annotated[bytes, msgspec.Meta(min_length=1)]  # as base64
    key: _Key  # of the session, and its version
    version: _Version
    expires_at: _Time

    def __repr__(self) -> str:
        return f"<_Frame of {self.blob}: {len(self.frame)} bytes>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("blob", self.blob)]


class _Last(msgspec.Struct, forbid_unknown_fields=True):
    records: int
    sha256: str


_encode = msgspec.json.Encoder().encode
_row = msgspec.json.Decoder(_Row).decode
_frame = msgspec.json.Decoder(_Frame).decode


@click.command("export", short_help="Write all sessions to a file.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True))
@click.option("--force", is_flag=True, help="Replace FILE where it exists.")
@session_option
@with_appcontext
def export(file: Path, force: bool, cookie: str | None) -> None:
    """Write all sessions to FILE, or to the standard output if it is "-".

    FILE holds the data of your users: it can be read by its owner only, and appears when it is
    complete. Sessions that are written meanwhile are in it as they were before or after.
    """
    interface = chosen(cookie)
    to_pipe = str(file) == _PIPE
    if not to_pipe and file.exists() and not (force and file.is_file()):
        hint = "--force replaces it" if file.is_file() else "and is no file"
        raise click.UsageError(f"{file} exists: {hint}")
    name_store(interface)
    written = unreadable = incomplete = 0
    with told(interface, lambda: f"{counted(written, 'records')}; {file} was not written"):
        store = scanned(interface)
        with (
            _output(None if to_pipe else file) as out,
            progress("export", partial(about, interface)) as advance,
        ):
            digest = hashlib.sha256()

            def put(line: object) -> None:
                data = _encode(line) + b"\n"
                digest.update(data)
                out.write(data)

            put(_First(_FORMAT, name_of(interface), moment(interface.repository.now())))
            for page in pages(store):
                unreadable += len(page.unreadable)
                for record in page.records:
                    try:
                        for frame in _frames(interface.repository, record):
                            put(frame)
                    except ValueLost:
                        incomplete += 1
                    put(_Row(*record))
                written += len(page.records)
                advance(len(page.records))
            put(_Last(written, digest.hexdigest()))
    click.echo(f"{name_of(interface)}: {counted(written, 'records')} exported", err=to_pipe)
    if unreadable:
        click.echo(f"Error: {unreadable} more could not be read, and are not in it", err=True)
    if incomplete:
        whose = counted(incomplete, "sessions")
        click.echo(f"Error: large values of {whose} are lost, and not in it", err=True)
    sys.exit(bool(unreadable or incomplete))


def _frames(repository: Repository, record: Record) -> Iterator[_Frame]:
    """The large values of a record, as they are kept. Raises ``ValueLost``."""
    try:
        body = repository.read(record.key, record)
        values = body.values.values() if body is not None and body.spilled else ()
        references = [reference_in(raw) for raw in values if refers(raw)]
    except UnreadableRecord:
        return
    end = record.idle_expires_at + BLOB_GRACE
    for reference in references:
        if repository.spill is None:
            raise ValueLost("missing")
        for offset, frame in repository.spill.stored(reference):
            yield _Frame(reference.name, offset, frame, record.key, record.version, end)


@contextmanager
def _output(file: Path | None) -> Iterator[BinaryIO]:
    """A file that appears under its name when all is in it; without one the standard output."""
    if file is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part: Path | None = None
    try:
        _remove_leftovers(file)
        descriptor, part = _part_of(file)
        with open(descriptor, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
            part.replace(file)
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _part_of(file: Path) -> tuple[int, Path]:
    """A new file beside ``file``, which can be read by its owner only, and is locked."""
    while True:
        descriptor, name = tempfile.mkstemp(_PART, _beginning(file), file.parent)  # 0600
        with suppress(OSError):  # not every file system has locks
            file_locks.lock(descriptor)
        if os.fstat(descriptor).st_nlink:  # else somebody took it for a leftover
            return descriptor, Path(name)
        os.close(descriptor)


def _remove_leftovers(file: Path) -> None:
    """Remove what exports to ``file`` left that were killed; those that run hold a lock."""
    name = re.compile(re.escape(_beginning(file)) + r"\w{8}" + re.escape(_PART), re.ASCII)
    try:
        beside = list(file.parent.iterdir())
    except OSError:  # there may be folders that only take files
        return
    for part in beside:
        if not name.fullmatch(part.name):
            continue
        with suppress(OSError):
            descriptor = os.open(part, os.O_RDWR | NO_FOLLOW | NO_WAIT)
            try:
                file_locks.lock(descriptor, wait=False)
                head = os.read(descriptor, len(_BEGIN))
                if stat.S_ISREG(os.fstat(descriptor).st_mode) and _BEGIN.startswith(head):
                    part.unlink()
                    click.echo(f"{part} was left by an export that was killed: removed", err=True)
            finally:
                os.close(descriptor)


def _beginning(file: Path) -> str:
    return f".{file.name[:40]}."


@click.command("import", short_help="Put the sessions of such a file into the store.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True))
@click.option("--overwrite", is_flag=True, help="Also what was changed in this store since.")
@click.option("--skip-unreadable", is_flag=True, help="Leave out what cannot be read here.")
@click.option("--skip", type=click.IntRange(0), default=0, help="Begin after so many records.")
@click.option("--dry-run", is_flag=True, help="Look at FILE and the store; import nothing.")
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
    """Put the sessions of FILE, or of the standard input if it is "-", into the store.

    FILE is checked from beginning to end before anything is written. What has expired is left out.
    A session that is there already stays as it is, so that a second import does no harm.

    Trust FILE as you trust the store: whoever wrote it chose who is logged in.
    """
    interface = chosen(cookie)
    repository, name = interface.repository, name_of(interface)
    done: Counter[str] = Counter()
    name_store(interface)

    def so_far() -> str:
        number = skip + done.total()
        return f"{counted(number, 'records')} (--skip {number} goes on from there)" if done else ""

    with told(interface, so_far), _input(file) as source:
        total, unreadable = _check(source, file, repository, skip_unreadable)
        patiently = Patience()
        with progress("import", lambda: total) as advance:
            advance(min(skip, total))
            number = 0
            for item in _items(source, file):
                number += isinstance(item, Record)
                if isinstance(item, _Frame):
                    if number >= skip and not dry_run and item.key not in unreadable:
                        patiently(_put_frame, interface, item, overwrite)
                elif number > skip:
                    done[patiently(_put, interface, item, overwrite, dry_run)] += 1
                    advance(1)
    if as_json:
        click.echo(json.dumps({"session": name, "dry_run": dry_run, "records": done}, indent=2))
    else:
        would = "to be " if dry_run else ""
        parts = [f"{done['imported']} {would}imported"]
        parts += [f"{done[what]} {what}" for what in sorted(done) if what != "imported"]
        click.echo(f"{name}: {', '.join(parts)}")


def _put(interface: GSessionInterface, record: Record, overwrite: bool, dry_run: bool) -> str:
    """Import a record; what became of it."""
    store, repository = interface.store, interface.repository
    if _read(repository, record)[0]:
        return "unreadable"
    record = _capped(repository, record)
    if repository.now() >= record.idle_expires_at:
        return "expired"
    if dry_run and not_there_yet(interface):
        return "imported"
    try:
        there = unexpired(store, record.key, repository.now())
        if there is None:
            if not dry_run:
                store.create(record)
            return "imported"
        if there.version == record.version:
            return "there already"
        if overwrite and record.successor is None:
            if not dry_run:
                store.save(record, there.version)
            return "overwritten"
    except (KeyTaken, Gone, Stale, UnreadableRecord):  # somebody was quicker, or it is no record
        pass
    return "kept as changed since"


def _capped(repository: Repository, record: Record) -> Record:
    """The record, which ends no later than one that this application creates now."""
    now = repository.now()
    absolute = min(record.absolute_expires_at, repository.latest_end())
    capped = record._replace(
        created_at=min(record.created_at, now, absolute),
        idle_expires_at=min(record.idle_expires_at, absolute),
        absolute_expires_at=absolute,
    )
    return record if capped == record else repository.with_times(record, capped)


def _put_frame(interface: GSessionInterface, item: _Frame, overwrite: bool) -> None:
    """Import a piece of a large value, where the session that it belongs to is to be imported."""
    repository = interface.repository
    end = min(item.expires_at, repository.latest_end() + BLOB_GRACE)
    if repository.now() >= end:
        return
    try:
        there = unexpired(interface.store, item.key, repository.now())
    except UnreadableRecord:
        return
    if there is not None:
        if not overwrite or there.version == item.version or there.successor is not None:
            return
        # It may refer to the very same value, whose time must not become shorter.
        end = max(end, there.absolute_expires_at + BLOB_GRACE)
    assert repository.spill is not None  # it was checked
    with suppress(Gone):  # it was removed meanwhile: the session says that its value is lost
        repository.spill.blobs.write_frame(item.blob, item.offset, item.frame, end)


@contextmanager
def _input(file: Path) -> Iterator[BinaryIO]:
    """A file that can be read twice."""
    try:
        if str(file) == _PIPE:
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
                yield copy
        else:
            with file.open("rb") as source:
                yield source
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from None


class _Values:
    """The frames of large values since the last record, which the next record must refer to."""

    def __init__(self) -> None:
        self._owner: tuple[str, int] | None = None
        self._ends: dict[str, int] = {}

    def add(self, frame: _Frame) -> str:
        """What is wrong with the next frame; empty where nothing is."""
        owner = frame.key, frame.version
        if self._owner not in (None, owner):
            return "a large value without its session"
        if frame.offset != self._ends.get(frame.blob, 0):
            return "a piece of a large value in the wrong place"
        self._owner = owner
        self._ends[frame.blob] = frame.offset + len(frame.frame)
        return ""

    def close(self, record: Record | None, body: Body | None) -> str:
        """What is wrong with them, where this is the record behind them; None: it is the end.

        Without a body the record can't be read, and its large values are left out with it.
        """
        owner, ends = self._owner, self._ends
        self._owner, self._ends = None, {}
        if owner is None:
            return ""
        if record is None or owner != (record.key, record.version):
            return "a large value without its session"
        if body is not None:
            references = [reference_in(raw) for raw in body.values.values() if refers(raw)]
            lengths = {each.name: stored_length(each) for each in references}
            for name, end in ends.items():
                if end > lengths.get(name, 0):
                    return "a large value that its session does not have, or a longer one"
        return ""


def _check(
    source: BinaryIO, file: Path, repository: Repository, skip_unreadable: bool
) -> tuple[int, set[str]]:
    """How many records the file has, and the keys of the unreadable ones.

    Ends the command unless the file is whole, and of use here.
    """
    source.seek(0)
    digest = hashlib.sha256()
    problems: Counter[str] = Counter()
    unreadable: set[str] = set()
    large = _Values()
    records = number = 0
    last: _Last | None = None
    problem = ""
    while not problem and (line := source.readline(_LONGEST)):
        number += 1
        try:
            if last is not None:
                problem = "something follows the end"
            elif not line.endswith(b"\n"):
                problem = "the file is cut off" if len(line) < _LONGEST else "the line is too long"
            elif number == 1:
                version = msgspec.json.decode(line, type=_First).flask_gsession
                problem = "" if version == _FORMAT else f"format {version}, and this is {_FORMAT}"
            elif line.startswith(_LAST):
                last = msgspec.json.decode(line, type=_Last)
                if last != _Last(records, digest.hexdigest()):
                    problem = "the checksum of all before it is another: the file was altered"
                else:
                    problem = large.close(None, None)
            elif line.startswith(_FRAME):
                problem = large.add(_frame(line))
                if repository.spill is None:
                    problem = "a large value, and this store has no place for such"
            else:
                records += 1
                record = _record(line)
                why, body = _read(repository, record)
                if why:
                    problems[why] += 1
                    unreadable.add(record.key)
                problem = large.close(record, body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            problem = "no line of an export"
        digest.update(line)
    name = "the standard input" if str(file) == _PIPE else file
    if not number:
        raise click.ClickException(f"{name} is empty; nothing was imported")
    if last is None and not problem:
        problem = "the file is cut off"
    if problem:
        raise click.ClickException(f"{name}: line {number}: {problem}; nothing was imported")
    if problems and not skip_unreadable:
        reasons = ", ".join(
            f"{counted(count, 'times')} {reason}" for reason, count in problems.items()
        )
        whose = f"{problems.total()} of {counted(records, 'records')}"
        plain = any(NOT_ENCRYPTED in reason for reason in problems)
        advice = (
            'Add "plain" at the end of SESSION_ENCRYPTION_KEYS to read sessions that are not '
            "encrypted"
            if plain
            else "Give it the key that is missing"
        )
        raise click.ClickException(
            f"{name}: {whose} cannot be read by this application "
            f"({reasons}); nothing was imported. {advice}, or leave them "
            "out with --skip-unreadable"
        )
    return records, unreadable


def _items(source: BinaryIO, file: Path) -> Iterator[Record | _Frame]:
    """The records of a file that was checked, and before each the frames of its large values."""
    source.seek(0)
    source.readline(_LONGEST)
    try:
        while not (line := source.readline(_LONGEST)).startswith(_LAST):
            yield _frame(line) if line.startswith(_FRAME) else _record(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise click.ClickException(
            f"{file} was changed while it was imported: import it again"
        ) from None


def _record(line: bytes) -> Record:
    return Record(*msgspec.structs.astuple(_row(line)))


def _read(repository: Repository, record: Record) -> tuple[str, Body | None]:
    """Why the application can't read a record, empty where it can; and what the record holds."""
    if not is_session_key(record.key):
        return "no key of a session", None
    try:
        body = repository.read(record.key, record)
        if body is not None:
            for raw in body.values.values():
                if refers(raw):
                    reference_in(raw)
    except UnreadableRecord as error:
        known = NOT_ENCRYPTED in error.detail
        return f"{error.reason} ({error.detail})" if known else error.reason, None
    return "", Body({}) if body is None else body
