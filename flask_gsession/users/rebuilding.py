"""Repairs rosters from the sessions in the store."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from ..errors import Gone, RosterUnreadable, SettingError, Stale, UnreadableRecord
from ..events import SessionBound
from ..repository.repository import Loaded, Repository
from ..stores.base import is_session_key
from ..stores.parts import parts_of
from ..values.marks import split
from ..values.payload import Body, Owner
from .roster import MOST_DEVICES, Device, Roster, Since, enter
from .rosters import LOGIN, checked_user_id, new_device_id


def rebuild(repository: Repository, only: str | None, *, foreign: bool = False) -> int:
    """See ``Users.rebuild``."""
    lost: dict[str, list[Device]] = {}
    if only is not None and _is_damaged(repository, only, foreign):
        lost[only] = []
    intact: set[str] = set()
    unbound = False
    for loaded in _sessions(repository):
        owner = loaded.body.owner
        if owner is None:
            unbound = unbound or login_of(repository, loaded.body) is not None
        elif only in (None, owner.user_id) and owner.user_id not in intact:
            if owner.user_id not in lost and _is_intact(repository, owner.user_id, foreign):
                intact.add(owner.user_id)
            else:
                lost.setdefault(owner.user_id, []).append(_device(loaded, owner))
    entered = 0
    for user_id, devices in lost.items():
        devices.sort(key=lambda device: device.created)
        entered += _restore(repository, user_id, devices[-MOST_DEVICES:])
    for loaded in _sessions(repository) if unbound else ():
        if loaded.body.owner is None:
            login = login_of(repository, loaded.body)
            if login is not None and only in (None, login):
                entered += _bind(repository, login, loaded)
    return entered


def _restore(repository: Repository, user_id: str, devices: list[Device]) -> int:
    """Enter these devices in a roster that is damaged or lost; how many."""
    rosters = repository.rosters
    # When sessions were last revoked is lost as well: nothing from before comes in.
    fresh = rosters.revoke_all(Roster())

    def step(roster: Roster) -> tuple[Roster, int]:
        if roster.epoch:
            return roster, 0  # they were revoked since the store was gone through
        known = {device.id for device in roster.devices}  # signed in since
        lost = [device for device in devices if device.id not in known]
        return replace(fresh, devices=(*lost, *roster.devices)), len(lost)

    try:
        return rosters.change(user_id, step)
    except RosterUnreadable:
        if rosters.replace_unreadable(user_id, replace(fresh, devices=tuple(devices))):
            return len(devices)
        return rosters.change(user_id, step)  # somebody else repaired it


def _sessions(repository: Repository) -> Iterator[Loaded]:
    scans = parts_of(repository.store).scans
    if scans is None:
        raise SettingError(
            f"{type(repository.store).__name__} can't go through its sessions (it has no part "
            "`scans`), so rosters can't be rebuilt from them"
        )
    cursor = ""
    seen: set[str] = set()
    while True:
        page = scans.scan(cursor)
        for record in page.records:
            if record.successor is None and is_session_key(record.key) and record.key not in seen:
                seen.add(record.key)
                try:
                    body = repository.read(record.key, record)
                except UnreadableRecord:
                    continue
                if body is not None:
                    yield Loaded(record, body)
        cursor = page.cursor
        if not cursor:
            return


def _is_intact(repository: Repository, user_id: str, foreign: bool) -> bool:
    """Whether the user has a roster, and it can be read."""
    return (
        not _is_damaged(repository, user_id, foreign)
        and repository.rosters.look(user_id).record is not None
    )


def _is_damaged(repository: Repository, user_id: str, foreign: bool) -> bool:
    """``foreign``: so is one that needs another encryption key, or a newer version."""
    try:
        repository.rosters.look(user_id)
    except RosterUnreadable as error:
        if error.for_others and not foreign:
            raise
        return True
    return False


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
    """Bind a session from before this version, as its next save would do."""
    record, body, rosters = loaded.record, loaded.body, repository.rosters
    until = repository.listed_until(body.values, body.lifetime, record)
    now = repository.now() // 1000
    device = Device(new_device_id(), record.key, record.created_at // 1000, now, until)

    def step(roster: Roster) -> tuple[Roster, Device | None]:
        since = Since(None, record.created_at)
        entered = enter(roster, device, since, rosters.limit, "refuse")
        return entered.roster, entered.device

    member = rosters.change(user_id, step)
    if member is None:
        return False  # refused; its next save ends it
    owner = Owner(user_id, member.id, now, until)
    try:
        repository.save_owner(record, body, owner)
    except (Stale, Gone):
        return False  # its request does it
    repository.events.emit(SessionBound, user_id, member.id, record.key, "earlier version")
    return True
