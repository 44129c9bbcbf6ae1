"""The checks of ``flask gsession doctor`` on the lists of users' sessions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from ..errors import RosterUnreadable, SettingError, StoreError, UnreadableRecord
from ..repository.repository import Repository
from ..stores.base import Record, is_session_key
from ..stores.parts import Finding, Scans, parts_of
from ..users.rebuilding import login_of
from ..users.rosters import is_roster, roster_key
from ..values.payload import Owner

_MAX_SECONDS = 5.0  # for scanning the store
_MAX_USERS = 200  # whose rosters are checked
_SETTLED = 60_000  # milliseconds after which a session must be in its roster
_REBUILD = "flask gsession users rebuild"


def check_users(
    repository: Repository, found: Iterable[Finding], binds_logins: bool
) -> list[Finding]:
    """Look for damaged, lost and incomplete lists of users' sessions.

    Scans the store for five seconds at most, and changes nothing. ``found``: the findings about the
    store. ``binds_logins``: whether the application has Flask-Login. Returns nothing if no session
    is bound. Doesn't raise if the store fails, since other checks report that.
    """
    scans = parts_of(repository.store).scans
    if scans is None:
        return []
    try:
        return list(_check(repository, scans, list(found), binds_logins))
    except (StoreError, SettingError):
        return []


def _check(
    repository: Repository, scans: Scans, found: list[Finding], binds_logins: bool
) -> Iterator[Finding]:
    owners: dict[str, Owner] = {}  # by session key: the latest session of some users
    unreadable: dict[str, UnreadableRecord] = {}  # by roster key
    bound = unbound = looked = 0
    end = time.monotonic() + _MAX_SECONDS
    whole = True
    for record in _records(scans):
        if time.monotonic() > end:
            whole = False
            break
        if is_roster(record):
            try:
                repository.rosters.read(record)
            except UnreadableRecord as error:
                unreadable[record.key] = error
        if not is_session_key(record.key):
            continue
        looked += 1
        try:
            body = repository.records.read(record.key, record)
        except UnreadableRecord:
            continue
        if body is None:
            continue
        if body.owner is not None:
            bound += 1
            if len(owners) < _MAX_USERS:
                owners[record.key] = body.owner
        elif binds_logins and login_of(repository, body) is not None:
            unbound += 1
    of = "" if whole else f" among the first {looked}"
    if bound or unreadable:
        yield from _rosters(repository, owners, unreadable)
        yield from _eviction(found)
    if unbound:
        yield Finding(
            "warning",
            "lists of sessions",
            f"sessions{of} that aren't in a list yet: {unbound}",
            "Until they are used again, ext.users.devices() doesn't show them. Add them: "
            f"{_REBUILD}",
        )


def _records(scans: Scans) -> Iterator[Record]:
    cursor = ""
    while True:
        page = scans.scan(cursor)
        for record in page.records:
            if record.successor is None:
                yield record
        cursor = page.cursor
        if not cursor:
            return


def _rosters(
    repository: Repository, owners: dict[str, Owner], unreadable: dict[str, UnreadableRecord]
) -> Iterator[Finding]:
    users = dict.fromkeys(owner.user_id for owner in owners.values())
    lost = 0
    for user_id in islice(users, _MAX_USERS):
        try:
            record = repository.rosters.look(user_id).record
        except RosterUnreadable:
            _note(repository, roster_key(user_id), unreadable)
            continue
        lost += record is None and any(
            _is_lost(repository, key, owner)
            for key, owner in owners.items()
            if owner.user_id == user_id
        )
    number = len({*map(roster_key, users), *unreadable})
    reasons = Counter((error.reason, error.for_others) for error in unreadable.values())
    for (reason, for_others), some in reasons.items():
        advice = f"Requests of these users get 503. Repair the rosters: {_REBUILD}"
        if for_others:
            advice = (
                "Requests of these users get 503 from this version and settings: update it, or add "
                "the key to SESSION_ENCRYPTION_KEYS. If no worker can read them any more: "
                f"{_REBUILD} --replace-foreign"
            )
        yield Finding("error", "rosters", f"{some} of {number}: {reason}", advice)
    if lost:
        yield Finding(
            "error",
            "rosters",
            f"{lost} of {number} are missing, perhaps after an eviction",
            f"Their users are signed out at the next use. Restore them before: {_REBUILD}",
        )
    if not unreadable and not lost:
        yield Finding("ok", "rosters", f"{number} checked")


def _note(repository: Repository, key: str, unreadable: dict[str, UnreadableRecord]) -> None:
    """Note why a roster can't be read. The store itself may raise the error."""
    try:
        record = repository.store.load(key)
        if record is not None:
            repository.rosters.read(record)
    except UnreadableRecord as error:
        unreadable[key] = error


def _is_lost(repository: Repository, key: str, owner: Owner) -> bool:
    """Whether the session is still there, although its user has no roster."""
    try:
        loaded = repository.find(key)
    except UnreadableRecord:
        return False
    settled = repository.now() - owner.seen * 1000 >= _SETTLED
    return settled and loaded is not None and loaded.body.owner == owner


def _eviction(found: list[Finding]) -> Iterator[Finding]:
    for finding in found:
        if finding.check == "eviction" and finding.severity != "ok":
            yield Finding(
                "error",
                "eviction of rosters",
                finding.found,
                "Evicting a user's roster signs the user out everywhere: set "
                "maxmemory-policy to noeviction.",
            )
