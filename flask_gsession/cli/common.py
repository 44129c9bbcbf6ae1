"""What the commands have in common: which session, what was found, and what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import click
from flask import current_app

from ..errors import StoreUnavailable
from ..extension import NAME, Session
from ..interface import GSessionInterface
from ..repository.scanning import all_pages
from ..stores import Record, Scans
from ..stores.base import KEY_LENGTH, is_session_key
from ..stores.memory import MemoryStore
from ..stores.parts import parts_of
from ..stores.urls import without_hosts
from ..values.marks import END_OF_TIME

INTERRUPTED = 130  # the exit status of what Ctrl-C ended, as shells have it
NO_SESSION = "no such session; it may have ended"
_SHORTEST = 8  # characters of a handle that one need type

#: ``flask gsession`` is run with a session by this option, where the application has several.
session_option = click.option(
    "--session", "cookie", metavar="COOKIE", help="Which, by its cookie, where there are several."
)
json_option = click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")


def interfaces() -> dict[Session, GSessionInterface]:
    """Every ``Session`` of the application; ends the command where there is none."""
    found: dict[Session, GSessionInterface] = current_app.extensions.get(NAME, {})
    if not found:
        raise click.ClickException("The application has no Session: call Session(app) first.")
    return found


def chosen(cookie: str | None) -> GSessionInterface:
    """The one ``Session`` of the application, or the one with this cookie."""
    by_name = {each.repository.live.cookie_name(): each for each in interfaces().values()}
    if cookie is None and len(by_name) == 1:
        (cookie,) = by_name
    if cookie not in by_name:
        wrong = "Say which session" if cookie is None else f"No session has the cookie {cookie!r}"
        raise click.UsageError(f"{wrong}: --session {' | '.join(by_name)}")
    interface = by_name[cookie]
    if isinstance(interface.store, MemoryStore):
        click.echo("The memory store is this process's own: of others nothing is seen.", err=True)
    return interface


def name_of(interface: GSessionInterface) -> str:
    """What messages call a ``Session``: its cookie."""
    return interface.repository.live.cookie_name()


def name_store(interface: GSessionInterface) -> None:
    """Say which store it is, on the error output: the settings may come from elsewhere."""
    click.echo(f"{name_of(interface)}: the store is {place(interface)}", err=True)


def place(interface: GSessionInterface) -> str:
    """Where the store is, without what may be a secret: user, password and options."""
    source, path = interface.repository.settings.store, getattr(interface.store, "path", None)
    if path is not None:
        return f"sqlite:///{path}"
    if not isinstance(source, str):
        return f"a {type(source).__name__} of the application's own"
    parts, hosts = without_hosts(source)
    path = "" if "@" in parts.path else parts.path
    return f"{parts.scheme}://{hosts.rpartition('@')[2]}{path}"


def not_there_yet(interface: GSessionInterface) -> bool:
    """Whether the store is a file that the first session makes: to look into it would, too.

    Who looks may be another user than the one who is to write to it.
    """
    path = getattr(interface.store, "path", None)
    try:
        if isinstance(path, Path):
            path.stat()
    except FileNotFoundError:
        return True
    except OSError:  # whether it is there cannot be known
        pass
    return False


def scanned(interface: GSessionInterface) -> Scans:
    """The store, which can go through its sessions; ends the command where it cannot."""
    scans = parts_of(interface.store).scans
    if scans is None:
        raise click.ClickException(
            f"{name_of(interface)}: {type(interface.store).__name__} cannot list its sessions "
            "(it has no part `scans`)"
        )
    return MemoryStore() if not_there_yet(interface) else scans


def about(interface: GSessionInterface) -> int | None:
    """How many sessions there are, more or less; None where the store does not say."""
    counts = parts_of(interface.store).counts
    if not_there_yet(interface):
        return 0
    with suppress(StoreUnavailable):  # what cannot go on without it says so
        return None if counts is None else counts.count()
    return None


def key_of(interface: GSessionInterface, handle: str) -> str:
    """The whole of a handle that may be cut off; ends the command where it is none, or several."""
    whole = len(handle) == KEY_LENGTH and is_session_key(handle)
    if not whole and (len(handle) < _SHORTEST or not is_session_key(handle.ljust(KEY_LENGTH, "-"))):
        raise click.UsageError(
            f"{handle!r} is no handle: {KEY_LENGTH} characters of A-Z a-z 0-9 - _, "
            f"or the first {_SHORTEST} or more of them"
        )
    if not_there_yet(interface):
        raise click.ClickException(f"{handle}: {NO_SESSION}")
    if whole:
        return handle
    found: set[str] = set()
    for page in all_pages(scanned(interface), handle):
        found.update(page.unreadable, (record.key for record in page.records))
    if len(found) > 1:
        raise click.ClickException(f"{len(found)} handles begin with {handle}: type more of it")
    return found.pop() if found else handle


@contextmanager
def told(interface: GSessionInterface, so_far: Callable[[], str] = str) -> Iterator[None]:
    """Ends the command with a message where the store fails, or on Ctrl-C; ``so_far`` is in it."""
    try:
        yield
    except StoreUnavailable as error:
        done = so_far()
        raise click.ClickException(
            f"{name_of(interface)}: the store failed{f' after {done}' if done else ''}: {error}"
        ) from None
    except KeyboardInterrupt:
        done = so_far()
        click.echo(f"{name_of(interface)}: interrupted{f' after {done}' if done else ''}", err=True)
        sys.exit(INTERRUPTED)


def is_terminal() -> bool:
    """Whether somebody reads what is printed, rather than something."""
    return sys.stdout.isatty()


def moment(milliseconds: int) -> str:
    """A time as text, in UTC. A record of somebody else's making may have one that is none."""
    if not 0 <= milliseconds < END_OF_TIME:
        return "(no-date)"
    time_ = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return time_.isoformat(timespec="seconds").replace("+00:00", "Z")


def span(milliseconds: int) -> str:
    """How long something is, in one or two units."""
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
    """What is known of a session without what is in it."""

    handle: str
    created_at: int  # milliseconds, as the others
    idle_expires_at: int
    absolute_expires_at: int
    bytes: int


def facts_of(record: Record) -> Facts:
    """What is known of a record without its payload."""
    return Facts(
        record.key,
        record.created_at,
        record.idle_expires_at,
        record.absolute_expires_at,
        len(record.payload),
    )


def described(facts: Facts) -> dict[str, object]:
    """The facts as they are printed: times as text."""
    times = {
        name: moment(getattr(facts, name))
        for name in ("created_at", "idle_expires_at", "absolute_expires_at")
    }
    return {"handle": facts.handle, **times, "bytes": facts.bytes}
