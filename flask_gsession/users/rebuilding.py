"""Repairs rosters from the sessions in the store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from msgspec.structs import replace

from ..errors import Gone, RosterUnreadable, SettingError, Stale, UnreadableRecord
from ..events import SessionBound
from ..repository.repository import Loaded, Repository
from ..stores.base import Record, is_session_key
from ..stores.parts import parts_of
from ..values.marks import split
from ..values.payload import Body, Owner
from .roster import MOST_DEVICES, Device, Roster, Since, enter
from .rosters import LOGIN, checked_user_id, is_roster, new_device_id, roster_key

_INTACT, _LOST, _DAMAGED, _FOREIGN = "intact", "lost", "damaged", "foreign"


def rebuild(repository: Repository, only: str | None, *, foreign: bool = False) -> int:
    """See ``Users.rebuild``."""
    wanted = None if only is None else roster_key(only)
    found = {} if wanted is None else {wanted: _state(repository, wanted, foreign)}
    if wanted is not None and found[wanted] == _FOREIGN:
        repository.rosters.look_at(wanted)  # raises
    devices: dict[str, list[Device]] = {}
    unbound = False
    for record in _records(repository):
        key = record.key
        if wanted is None and is_roster(record) and key not in found:
            found[key] = _state(repository, key, foreign, record)
        loaded = _session(repository, record)
        if loaded is None:
            continue
        owner = loaded.body.owner
        if owner is None:
            unbound = unbound or login_of(repository, loaded.body) is not None
        elif only in (None, owner.user_id):
            key = roster_key(owner.user_id)
            if key not in found:
                found[key] = _state(repository, key, foreign)
            if found[key] != _INTACT:
                devices.setdefault(key, []).append(_device(loaded, owner))
    entered = 0
    for key, state in found.items():
        some = sorted(devices.get(key, ()), key=lambda device: device.created)
        if state == _DAMAGED or (state == _LOST and some):
            entered += _restore(repository, key, some[-MOST_DEVICES:])
    for record in _records(repository) if unbound else ():
        loaded = _session(repository, record)
        if loaded is not None and loaded.body.owner is None:
            login = login_of(repository, loaded.body)
            wants = login is not None and only in (None, login)
            if login is not None and wants and found.get(roster_key(login)) != _FOREIGN:
                entered += _bind(repository, login, loaded)
    for key, state in found.items():
        if state == _FOREIGN:  # raises, now that all others are repaired
            repository.rosters.look_at(key)
    return entered


def count_foreign(repository: Repository) -> tuple[int, int]:
    """How many rosters need another encryption key or a newer version, and how many there are."""
    states = [
        _state(repository, record.key, False, record)
        for record in _records(repository)
        if is_roster(record)
    ]
    return states.count(_FOREIGN), len(states)


def _state(repository: Repository, key: str, foreign: bool, record: Record | None = None) -> str:
    """The state of the roster under ``key``.

    ``foreign``: a roster that other workers may be able to read counts as damaged. One round trip,
    unless the ``record`` can be read.
    """
    if record is not None:
        with suppress(UnreadableRecord):
            repository.rosters.read(record)
            return _INTACT
    try:
        return _LOST if repository.rosters.look_at(key).record is None else _INTACT
    except RosterUnreadable as error:
        return _FOREIGN if error.for_others and not foreign else _DAMAGED


def _restore(repository: Repository, key: str, devices: list[Device]) -> int:
    """Enter these devices in a roster that is damaged or lost. Returns how many."""
    rosters = repository.rosters
    # The time of the last revocation is lost as well, so no earlier session is entered.
    fresh = rosters.revoke_all(Roster())

    def step(roster: Roster) -> tuple[Roster, int]:
        if roster.epoch:
            return roster, 0  # they were revoked since the scan
        known = {device.id for device in roster.devices}  # signed in since the scan
        lost = [device for device in devices if device.id not in known]
        return replace(fresh, devices=(*lost, *roster.devices)), len(lost)

    try:
        return rosters.change_at(key, step)
    except RosterUnreadable:
        if rosters.replace_unreadable(key, replace(fresh, devices=tuple(devices))):
            return len(devices)
        return rosters.change_at(key, step)  # another process repaired it


def _records(repository: Repository) -> Iterator[Record]:
    scans = parts_of(repository.store).scans
    if scans is None:
        raise SettingError(
            f"{type(repository.store).__name__} can't list its sessions (it has no part "
            "`scans`), so rosters can't be rebuilt from them"
        )
    cursor = ""
    seen: set[str] = set()
    while True:
        page = scans.scan(cursor)
        for record in page.records:
            if record.successor is None and record.key not in seen:
                seen.add(record.key)
                yield record
        cursor = page.cursor
        if not cursor:
            return


def _session(repository: Repository, record: Record) -> Loaded | None:
    """The session in a record, unless it is something else, can't be read or has expired."""
    if not is_session_key(record.key):
        return None
    try:
        body = repository.records.read(record.key, record)
    except UnreadableRecord:
        return None
    return None if body is None else Loaded(record, body)


def login_of(repository: Repository, body: Body) -> str | None:
    """The user that Flask-Login signed in to the session."""
    raw = body.values.get(LOGIN)
    if raw is None:
        return None
    try:
        return checked_user_id(repository.codec.decode(split(raw)[1]))
    except (UnreadableRecord, ValueError):
        return None


def _device(loaded: Loaded, owner: Owner) -> Device:
    record = loaded.record
    created = record.created_at // 1000
    return Device(owner.device_id, record.key, created, max(owner.seen, created), owner.until)


def _bind(repository: Repository, user_id: str, loaded: Loaded) -> bool:
    """Bind a session that an older version stored, as its next save would."""
    record, body, rosters = loaded.record, loaded.body, repository.rosters
    until = repository.expiry.listed_until(body.values, body.lifetime, record)
    now = repository.now() // 1000
    device = Device(new_device_id(), record.key, record.created_at // 1000, now, until)

    def step(roster: Roster) -> tuple[Roster, Device | None]:
        since = Since(None, record.created_at)
        entered = enter(roster, device, since, rosters.limit, "refuse")
        return entered.roster, entered.device

    member = rosters.change(user_id, step)
    if member is None:
        return False  # refused; the next save of the session ends it
    owner = Owner(user_id, member.id, now, until)
    try:
        repository.store.save(repository.records.with_owner(record, body, owner), record.version)
    except (Stale, Gone):
        return False  # a request saved the session, and so bound it
    if repository.journaling is not None:
        repository.journaling.append_bound(record.key, user_id, member.id)
    repository.events.emit(SessionBound, user_id, member.id, record.key, "earlier version")
    return True
