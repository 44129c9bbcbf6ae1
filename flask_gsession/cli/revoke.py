"""``flask gsession revoke``."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from typing import NoReturn

import click
from flask.cli import with_appcontext

from ..errors import LogoutUnconfirmed, SessionEnded, UnreadableRecord
from ..events import DeviceRevoked, SessionRevoked
from ..interface import GSessionInterface
from ..repository.ending import delete_session
from ..repository.repository import Repository
from ..repository.scanning import all_pages
from ..stores import Record
from ..stores.parts import parts_of
from ..stores.support import because
from ..values.payload import Owner
from .common import (
    HANDLE_ARGUMENT,
    NO_SESSION,
    choose_interface,
    estimate_count,
    file_is_missing,
    print_store,
    report_failures,
    require_scans,
    resolve_handle,
    session_name,
    session_option,
    store_location,
)
from .output import pluralize, progress
from .users import check_user, report_user_failures, users_of

#: ``by`` in the events of sessions that this command ends.
BY = "flask gsession"
_ROUNDS = 20  # through all sessions, at most


@click.command(context_settings=HANDLE_ARGUMENT, short_help="End sessions.")
@click.argument("handles", metavar="[HANDLE...]", nargs=-1)
@click.option("--all", "everybody", is_flag=True, help="End every session; asks first.")
@click.option("--user", metavar="USER", help="End every session of this user; asks first.")
@click.option("--others", metavar="HANDLE", help="With --user: all but this session; asks first.")
@click.option("--device", metavar="ID", help="With --user: only the session on this device.")
@click.option("--reason", metavar="TEXT", help="Why, for the audit log.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@session_option
@with_appcontext
def revoke(
    handles: tuple[str, ...],
    everybody: bool,
    user: str | None,
    others: str | None,
    device: str | None,
    reason: str | None,
    yes: bool,
    cookie: str | None,
) -> None:
    """End sessions. Their tokens stop working at once.

    Exits with 1 if there was no session for a handle or a device, or if something else failed.
    After a rotation with grace, the old handle works as long as the old token does.

    --user and --others also refuse the user's sign-ins that are under way.
    """
    if bool(handles) + everybody + (user is not None) != 1:
        raise click.UsageError("Give one or more handles, or --user, or --all")
    if (others is not None or device is not None) and user is None:
        raise click.UsageError("--others and --device need --user")
    if others is not None and device is not None:
        raise click.UsageError("Give --others or --device, not both")
    interface = choose_interface(cookie)
    if everybody:
        _revoke_all(interface, yes, reason)
    if user is not None:
        _revoke_user(interface, check_user(user), others, device, reason, yes)
        return
    ended, problems = 0, []
    with report_failures(interface, lambda: pluralize(ended, "sessions") + " ended"):
        for handle in handles:
            key = resolve_handle(interface, handle)
            done, problem = _end(interface, key, reason)
            ended += done
            if problem:
                problems.append(f"{key}: {problem}")
            else:
                click.echo(f"{key}: ended")
    _report_waiting(interface)
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    sys.exit(bool(problems))


def _revoke_user(
    interface: GSessionInterface,
    user: str,
    others: str | None,
    device: str | None,
    reason: str | None,
    yes: bool,
) -> None:
    name = session_name(interface)
    if file_is_missing(interface):
        click.echo("0 sessions ended")
        return
    users = users_of(interface)
    kept = None if others is None else _device_of(interface, user, others)
    if device is None and not yes:
        with report_user_failures(interface, user):
            number = len(users.devices(user)) - (kept is not None)
        where = f"of {name!r} in {store_location(interface)}"
        other = "other " if kept is not None else ""
        click.confirm(
            f"End {pluralize(number, f'{other}sessions')} of user {user!a} {where}?",
            abort=True,
        )
    with report_user_failures(interface, user):
        try:
            if device is not None:
                if not users.revoke(user, device, reason=reason, by=BY):
                    raise click.ClickException(f"{device}: the user has no such device")
                ended = 1
            elif kept is not None:
                ended = users.revoke_others(user, kept, reason=reason, by=BY)
            else:
                ended = users.revoke_all(user, reason=reason, by=BY)
        except SessionEnded:
            raise click.ClickException(f"{others}: {NO_SESSION}; nothing else ended") from None
        except LogoutUnconfirmed as error:
            raise click.ClickException(f"{name}: ended, but {error}") from None
    click.echo(f"{pluralize(ended, 'sessions')} ended")


def _device_of(interface: GSessionInterface, user: str, handle: str) -> str:
    """The id of the device whose session has this handle. Fails if it isn't the user's."""
    with report_failures(interface):
        key = resolve_handle(interface, handle)
        try:
            loaded = interface.repository.find(key)
        except UnreadableRecord as error:
            raise click.ClickException(f"{key}: unreadable: {error}") from None
    if loaded is None:
        raise click.ClickException(f"{key}: {NO_SESSION}")
    owner = loaded.body.owner
    if owner is None or owner.user_id != user:
        raise click.ClickException(f"{key}: the session is not bound to this user")
    return owner.device_id


def _revoke_all(interface: GSessionInterface, yes: bool, reason: str | None) -> NoReturn:
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
                found: list[tuple[str, Record | None]] = (
                    [] if again else [(key, None) for key in page.unreadable]
                )
                # This round may have missed a session that was rotated during it. A rotation keeps
                # the creation time.
                found += [
                    (record.key, record)
                    for record in page.records
                    if not again or record.created_at <= begun
                ]
                for key, record in found:
                    done, problem = _end(interface, key, reason, record)
                    ended += done
                    problems[problem] += 1
                advance(0 if again else len(page.records))
            if ended == before:
                break
        else:
            problems["sessions are rotated faster than they can be ended: run it again"] = 1
    del problems[""], problems[NO_SESSION]  # a pointer to a session that ended earlier
    click.echo(f"{pluralize(ended, 'sessions')} ended")
    _report_waiting(interface)
    for problem, number in problems.items():
        click.echo(f"Error: {pluralize(number, 'times')}: {problem}", err=True)
    sys.exit(bool(problems))


def _report_waiting(interface: GSessionInterface) -> None:
    """Report sessions that an edge node has ended, but its centre hasn't."""
    edge = parts_of(interface.store).edge
    if edge is None:
        return
    with report_failures(interface):
        waiting = edge.figures().ends
    if waiting:
        click.echo(
            f"{waiting} ended sessions still work at the centre until it can be reached; this node "
            "settles them then. See flask gsession edge status.",
            err=True,
        )


def _end(
    interface: GSessionInterface, key: str, reason: str | None, record: Record | None = None
) -> tuple[bool, str]:
    """Whether a session ended, and the problem if there was one."""
    problem = ""
    repository = interface.repository
    owner = _owner_of(repository, key, record)
    try:
        with because(reason or "revoked", BY):
            ended = delete_session(repository, key, signs_out=False)
    except LogoutUnconfirmed as error:
        ended, problem = True, f"ended, but {error}"
    except UnreadableRecord as error:
        return False, f"unreadable: {error}"
    if not ended:
        return False, NO_SESSION
    repository.events.emit(SessionRevoked, key)
    if owner is not None:
        details = owner.user_id, owner.device_id, key, reason, BY
        repository.events.emit(DeviceRevoked, *details)
    return True, problem


def _owner_of(repository: Repository, key: str, record: Record | None) -> Owner | None:
    try:
        body = None if record is None else repository.records.read(key, record)
        if body is None:
            loaded = repository.find(key)
            body = None if loaded is None else loaded.body
    except UnreadableRecord:
        return None
    return None if body is None else body.owner
