"""Shared by the commands: options, handles, and the output of facts and errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import click
from flask import current_app

from ..errors import StoreUnavailable
from ..extension import NAME, Session
from ..interface import GSessionInterface
from ..repository.scanning import all_pages
from ..stores import Record, Scans, Store
from ..stores.base import KEY_LENGTH, is_session_key
from ..stores.memory import MemoryStore
from ..stores.parts import parts_of
from ..stores.urls import without_hosts
from ..values.marks import END_OF_TIME

INTERRUPTED = 130  # the exit status after Ctrl-C, as in shells
NO_SESSION = "no such session; it may have ended"
_MIN_HANDLE = 8  # characters

#: Selects a ``Session`` if the application has several.
session_option = click.option(
    "--session", "cookie", metavar="COOKIE", help="The cookie name, if there are several sessions."
)
#: Settings of a command with handles as arguments, since a handle may begin with a hyphen.
HANDLE_ARGUMENT = {"ignore_unknown_options": True}
json_option = click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")


def interfaces() -> dict[Session, GSessionInterface]:
    """Every ``Session`` of the application. Fails if it has none."""
    found: dict[Session, GSessionInterface] = current_app.extensions.get(NAME, {})
    if not found:
        raise click.ClickException("The application has no Session: call Session(app) first.")
    return found


def choose_interface(cookie: str | None, *, serves: bool = False) -> GSessionInterface:
    """The only ``Session`` of the application, or the one with this cookie.

    ``serves``: whether the command serves the sessions to other processes.
    """
    by_name = {each.repository.live.cookie_name(): each for each in interfaces().values()}
    if cookie is None and len(by_name) == 1:
        (cookie,) = by_name
    if cookie not in by_name:
        problem = "Choose a session" if cookie is None else f"No session has the cookie {cookie!r}"
        raise click.UsageError(f"{problem}: --session {' | '.join(by_name)}")
    interface = by_name[cookie]
    if isinstance(without_journal(interface), MemoryStore):
        click.echo(
            "The sessions are in the memory of this process, and end with it."
            if serves
            else "Each process has its own memory store: this command can't see your server's "
            "sessions.",
            err=True,
        )
    return interface


def session_name(interface: GSessionInterface) -> str:
    """The name of a ``Session`` in messages: its cookie."""
    return interface.repository.live.cookie_name()


def print_store(interface: GSessionInterface) -> None:
    """Print the store's location to standard error, so you notice settings from elsewhere."""
    click.echo(f"{session_name(interface)}: the store is {store_location(interface)}", err=True)


def store_location(interface: GSessionInterface) -> str:
    """The location of the store, without user, password and options."""
    source, path = interface.repository.settings.store, getattr(interface.store, "path", None)
    if path is not None:
        return f"sqlite:///{path}"
    if not isinstance(source, str):
        return client_location(source)
    parts, hosts = without_hosts(source)
    path = "" if "@" in parts.path else parts.path
    return f"{parts.scheme}://{hosts.rpartition('@')[2]}{path}"


def client_location(client: Any) -> str:
    """The servers of a Redis or MongoDB client, without connecting to them."""
    if client.__class__.__name__ == "MongoClient":
        addresses = client.topology_description.server_descriptions()
        places = (host if port is None else f"{host}:{port}" for host, port in addresses)
        return f"mongodb://{','.join(sorted(places))}"
    options = getattr(getattr(client, "connection_pool", None), "connection_kwargs", {})
    if "path" in options:
        return f"unix://{options['path']}"
    if "host" in options:
        return f"redis://{options['host']}:{options.get('port', 6379)}/{options.get('db', 0)}"
    service = getattr(getattr(client, "connection_pool", None), "service_name", None)
    if service is not None:
        return f"the Redis service {service} of Sentinels"
    return f"a {type(client).__name__} object"


def without_journal(interface: GSessionInterface) -> Store:
    """The store without its journal, so that throw-away sessions don't appear there."""
    journaling = interface.repository.journaling
    store: Store = interface.store if journaling is None else journaling.store
    return store


def file_is_missing(interface: GSessionInterface) -> bool:
    """Whether the store is an SQLite file that doesn't exist yet.

    Even a read would create it, possibly owned by the wrong user.
    """
    path = getattr(interface.store, "path", None)
    try:
        if isinstance(path, Path):
            path.stat()
    except FileNotFoundError:
        return True
    except OSError:  # unknown
        pass
    return False


def require_scans(interface: GSessionInterface) -> Scans:
    """The store's part for listing sessions. Fails if it has none."""
    scans = parts_of(interface.store).scans
    if scans is None:
        raise click.ClickException(
            f"{session_name(interface)}: {type(interface.store).__name__} can't list its sessions "
            "(it has no `scans` part)"
        )
    return MemoryStore() if file_is_missing(interface) else scans


def estimate_count(interface: GSessionInterface) -> int | None:
    """Roughly how many sessions there are, or None if the store can't estimate it."""
    counts = parts_of(interface.store).counts
    if file_is_missing(interface):
        return 0
    with suppress(StoreUnavailable):  # the command itself will report it
        return None if counts is None else counts.count()
    return None


def resolve_handle(interface: GSessionInterface, handle: str) -> str:
    """The complete handle for its first characters. Fails if several sessions match."""
    whole = len(handle) == KEY_LENGTH and is_session_key(handle)
    valid = is_session_key(handle.ljust(KEY_LENGTH, "A"))
    if not whole and (len(handle) < _MIN_HANDLE or not valid):
        raise click.UsageError(
            f"{handle!r} is not a handle: type {KEY_LENGTH} characters of A-Z a-z 0-9 - _, "
            f"or at least the first {_MIN_HANDLE}"
        )
    if file_is_missing(interface):
        raise click.ClickException(f"{handle}: {NO_SESSION}")
    if whole:
        return handle
    found: set[str] = set()
    for page in all_pages(require_scans(interface), handle):
        found.update(page.unreadable, (record.key for record in page.records))
    if len(found) > 1:
        raise click.ClickException(
            f"{len(found)} handles start with {handle}: type more characters"
        )
    return found.pop() if found else handle


@contextmanager
def report_failures(
    interface: GSessionInterface, so_far: Callable[[], str] = str
) -> Iterator[None]:
    """Turns an outage or Ctrl-C in the block into a message that includes ``so_far``."""

    def problem(what: str) -> str:
        done = so_far()
        return f"{session_name(interface)}: {what}{f' after {done}' if done else ''}"

    try:
        yield
    except StoreUnavailable as error:
        raise click.ClickException(f"{problem('the store failed')}: {error}") from None
    except KeyboardInterrupt:
        click.echo(problem("interrupted"), err=True)
        sys.exit(INTERRUPTED)


def prints_to_terminal() -> bool:
    """Whether a person reads the output, not a program."""
    return sys.stdout.isatty()


def format_time(milliseconds: int) -> str:
    """A time in UTC as text. A damaged record may hold an invalid one."""
    if not 0 <= milliseconds < END_OF_TIME:
        return "(no-date)"
    time_ = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return time_.isoformat(timespec="seconds").replace("+00:00", "Z")


def format_duration(milliseconds: int) -> str:
    """A duration in one or two units."""
    seconds = max(0, milliseconds) // 1000
    for unit, length, finer, part in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if seconds >= length:
            rest = seconds % length // part
            return f"{seconds // length} {unit}" + (f" {rest} {finer}" if rest else "")
    return f"{seconds} s"


class Facts(NamedTuple):
    """A session without its values."""

    handle: str
    created_at: int  # this and the other times are in milliseconds
    idle_expires_at: int
    absolute_expires_at: int
    bytes: int


def facts_of(record: Record) -> Facts:
    """The facts in a record."""
    return Facts(
        record.key,
        record.created_at,
        record.idle_expires_at,
        record.absolute_expires_at,
        len(record.payload),
    )


def printable(facts: Facts) -> dict[str, object]:
    """The facts for output, with times as text."""
    times = {
        name: format_time(getattr(facts, name))
        for name in ("created_at", "idle_expires_at", "absolute_expires_at")
    }
    return {"handle": facts.handle, **times, "bytes": facts.bytes}
