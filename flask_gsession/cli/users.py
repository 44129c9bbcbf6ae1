"""The sessions of one user, for ``list``, ``show`` and ``revoke``; and ``flask gsession users``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import click
from flask.cli import AppGroup, with_appcontext

from ..errors import RevocationUnfinished, RosterUnreadable
from ..interface import GSessionInterface
from ..users.rebuilding import count_foreign
from ..users.rosters import checked_user_id
from ..users.users import UserDevice, Users
from ..values.payload import Owner
from .common import (
    choose_interface,
    file_is_missing,
    format_duration,
    format_time,
    json_option,
    print_store,
    prints_to_terminal,
    report_failures,
    require_scans,
    session_name,
    session_option,
    store_location,
)
from .output import pluralize, table

FOREIGN = (
    "Update this version, or add the key to SESSION_ENCRYPTION_KEYS; if no worker can read it any "
    "more: flask gsession users rebuild --replace-foreign"
)
_ABSENT = "-"  # in lines for other programs


def users_of(interface: GSessionInterface) -> Users:
    """``ext.users`` of this ``Session``, outside a request."""
    return Users(lambda: interface.repository, lambda: None)


def check_user(user: str) -> str:
    """Return ``user``. Fails if it can't be the id of a user."""
    try:
        return checked_user_id(user)
    except ValueError as error:
        raise click.UsageError(f"--user: {error}") from None


def in_one_line(text: str) -> str:
    """Text from an application, without control characters."""
    return "".join(each if each.isprintable() else "?" for each in text)


@contextmanager
def report_user_failures(interface: GSessionInterface, user: str | None = None) -> Iterator[None]:
    """Like ``report_failures``, but also prints the command to run next."""
    name = session_name(interface)
    with report_failures(interface):
        try:
            yield
        except RevocationUnfinished as error:
            raise click.ClickException(f"{name}: not all sessions have ended: {error}") from None
        except RosterUnreadable as error:
            problem = f"{name}: the user's list of sessions can't be read: {error.detail}"
            if error.for_others:
                raise click.ClickException(f"{problem}. {FOREIGN}") from None
            again = "flask gsession users rebuild" + (f" --user {user}" if user else "")
            raise click.ClickException(f"{problem}. Repair it: {again}") from None


# -- flask gsession list --user


def list_devices(interface: GSessionInterface, user: str, limit: int | None, as_json: bool) -> None:
    """Print the sessions of a user, the last seen first."""
    user = check_user(user)
    devices: list[UserDevice] = []
    if not file_is_missing(interface):
        with report_user_failures(interface, user):
            devices = users_of(interface).devices(user)
    shown = list(islice(devices, limit))
    if as_json:
        for device in shown:
            click.echo(json.dumps(_fields(device)))
    elif prints_to_terminal():
        _print_table(interface, shown)
    else:
        for device in shown:
            click.echo(_line(device))
    if len(devices) > len(shown):
        click.echo(f"There are {len(devices)}: use --limit to show more", err=True)
    if not devices:
        text = f"{session_name(interface)}: no sessions of this user in {store_location(interface)}"
        click.echo(text, err=True)


def _fields(device: UserDevice) -> dict[str, object]:
    times = {
        name: format_time(int(getattr(device, name).timestamp() * 1000))
        for name in ("created_at", "last_seen_at", "expires_at")
    }
    return {
        "handle": device.handle,
        "device_id": device.id,
        **times,
        "network": device.network,
        "label": device.label,
        "tags": list(device.tags),
        "remembered": device.remembered,
    }


def _line(device: UserDevice) -> str:
    fields = _fields(device)
    del fields["tags"], fields["remembered"]
    return " ".join(_ABSENT if each is None else in_one_line(str(each)) for each in fields.values())


def _print_table(interface: GSessionInterface, devices: list[UserDevice]) -> None:
    now = interface.repository.now()
    rows = [
        (
            device.id,
            in_one_line(device.label or ""),
            f"{format_duration(now - int(device.last_seen_at.timestamp() * 1000))} ago",
            format_duration(int(device.expires_at.timestamp() * 1000) - now),
            device.network or "",
            device.handle,
        )
        for device in devices
    ]
    if rows:
        columns = ["device", "label", "last seen", "ends in", "network", "handle"]
        table(columns, rows, wraps=["label"], drop=["ends in", "network", "handle"])


# -- flask gsession show


def device_facts(interface: GSessionInterface, owner: Owner | None) -> dict[str, object]:
    """The user of a session, and its entry in the user's list. One round trip."""
    if owner is None:
        return {}
    facts: dict[str, object] = {"user": owner.user_id, "device_id": owner.device_id}
    with report_user_failures(interface, owner.user_id):
        devices = users_of(interface).devices(owner.user_id)
    for device in devices:
        if device.id == owner.device_id:
            fields = _fields(device)
            names = ("label", "tags", "network", "last_seen_at", "remembered")
            return {**facts, **{name: fields[name] for name in names}}
    return facts


# -- flask gsession users


@click.group(cls=AppGroup, short_help="Repair lists of sessions, and delete users' values.")
def users() -> None:
    """Repair the lists of users' sessions, and delete users' values."""


@users.command(short_help="Repair the lists from the sessions in the store.")
@click.option("--user", metavar="USER", help="Only the list of this user.")
@click.option(
    "--replace-foreign",
    is_flag=True,
    help="Also replace lists that need an encryption key, or a version of Flask-GSession, that no "
    "worker has any more. For all users, unless you name one.",
)
@click.option("--yes", is_flag=True, help="Don't ask before replacing the lists of all users.")
@session_option
@json_option
@with_appcontext
def rebuild(
    user: str | None, replace_foreign: bool, yes: bool, cookie: str | None, as_json: bool
) -> None:
    """Repair the lists of users' sessions from the sessions in the store.

    A list that is damaged or lost gets all sessions that are bound to its user. Sessions that
    Flask-Login signed in before you upgraded are bound, and added to readable lists as well.
    Nothing else changes in a readable list, and the command ends no session.
    """
    user = None if user is None else check_user(user)
    interface = choose_interface(cookie)
    require_scans(interface)
    print_store(interface)
    entered = 0
    if not file_is_missing(interface):
        with report_user_failures(interface, user):
            if replace_foreign and user is None:
                _check_foreign(interface, yes)
            entered = users_of(interface).rebuild(user, replace_foreign=replace_foreign)
    if as_json:
        click.echo(json.dumps({"entered": entered}))
    else:
        click.echo(f"{pluralize(entered, 'sessions')} entered")


@users.command(short_help="Delete a user's values, such as when the account is deleted.")
@click.option("--user", metavar="USER", required=True, help="The user whose values to delete.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@session_option
@json_option
@with_appcontext
def forget(user: str, yes: bool, cookie: str | None, as_json: bool) -> None:
    """Delete the values that the application keeps for a user in session.shared.

    This ends no session: run "flask gsession revoke --user USER" first.
    """
    user = check_user(user)
    interface = choose_interface(cookie)
    print_store(interface)
    if not yes:
        click.confirm(f"Delete the values of this user in {store_location(interface)}?", abort=True)
    found = False
    if not file_is_missing(interface):
        with report_user_failures(interface, user):
            found = users_of(interface).forget(user)
    if as_json:
        click.echo(json.dumps({"forgotten": found}))
    else:
        click.echo("The values were deleted" if found else "This user has no values")


def _check_foreign(interface: GSessionInterface, yes: bool) -> None:
    """Refuse if this command has no encryption keys at all. Otherwise, ask first."""
    foreign, number = count_foreign(interface.repository)
    if not foreign:
        return
    if not interface.repository.settings.encryption_keys:
        raise click.ClickException(
            f"{session_name(interface)}: {foreign} of {number} lists can't be read, and "
            "SESSION_ENCRYPTION_KEYS is not set. Run this with the settings of your workers, or "
            "replace the list of one user with --user"
        )
    if not yes:
        click.confirm(
            f"{foreign} of {number} lists need an encryption key or a version that this command "
            "doesn't have. Workers that can read them then lose them, too, and sessions that "
            f"can't be read end. Replace {'it' if foreign == 1 else 'them'} in "
            f"{store_location(interface)}?",
            abort=True,
        )
