"""``flask gsession revoke``."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from typing import NoReturn

import click
from flask.cli import with_appcontext

from ..errors import LogoutUnconfirmed, UnreadableRecord
from ..events import SessionRevoked
from ..interface import GSessionInterface
from ..repository.scanning import all_pages
from .common import (
    HANDLE_ARGUMENT,
    NO_SESSION,
    choose_interface,
    estimate_count,
    print_store,
    report_failures,
    require_scans,
    resolve_handle,
    session_name,
    session_option,
    store_location,
)
from .output import pluralize, progress

_ROUNDS = 20  # through all sessions, at most


@click.command(context_settings=HANDLE_ARGUMENT, short_help="End sessions.")
@click.argument("handles", metavar="[HANDLE...]", nargs=-1)
@click.option("--all", "everybody", is_flag=True, help="End every session; asks first.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@session_option
@with_appcontext
def revoke(handles: tuple[str, ...], everybody: bool, yes: bool, cookie: str | None) -> None:
    """End sessions. Their tokens stop working at once.

    Exits with 1 if there was no session for a handle, or if something else failed. After a
    rotation with grace, the old handle works for as long as the old token.
    """
    if everybody == bool(handles):
        raise click.UsageError("Give one or more handles, or --all")
    interface = choose_interface(cookie)
    if everybody:
        _revoke_all(interface, yes)
    ended, problems = 0, []
    with report_failures(interface, lambda: pluralize(ended, "sessions") + " ended"):
        for handle in handles:
            key = resolve_handle(interface, handle)
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
    store = require_scans(interface)
    print_store(interface)
    ended = 0
    problems: Counter[str] = Counter()
    where = f"of {session_name(interface)!r} in {store_location(interface)}"
    if not yes:
        number = estimate_count(interface)
        whose = "every session" if number is None else f"about {pluralize(number, 'sessions')}"
        click.confirm(f"End {whose} {where}?", abort=True)
    begun = interface.repository.now()
    with (
        report_failures(interface, lambda: pluralize(ended, "sessions") + " ended"),
        progress("ending sessions", partial(estimate_count, interface)) as advance,
    ):
        for again in range(_ROUNDS):
            before = ended
            for page in all_pages(store):
                keys = [] if again else list(page.unreadable)
                # A session that was rotated during a round may have been missed. It keeps its
                # creation time.
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
            problems["sessions are rotated faster than they can be ended: run it again"] = 1
    del problems[""], problems[NO_SESSION]  # a pointer to a session that ended before it
    click.echo(f"{pluralize(ended, 'sessions')} ended")
    for problem, number in problems.items():
        click.echo(f"Error: {pluralize(number, 'times')}: {problem}", err=True)
    sys.exit(bool(problems))


def _end(interface: GSessionInterface, key: str) -> tuple[bool, str]:
    """Whether a session ended, and the problem if there was one."""
    problem = ""
    try:
        ended = interface.repository.delete(key)
    except LogoutUnconfirmed as error:
        ended, problem = True, f"ended, but {error}"
    except UnreadableRecord as error:
        return False, f"unreadable: {error}"
    if not ended:
        return False, NO_SESSION
    interface.repository.events.emit(SessionRevoked, key)
    return True, problem
