"""Enters imported sessions in the rosters of their users, so that a revocation ends them too."""

from __future__ import annotations

from ..errors import LogoutUnconfirmed, UnreadableRecord
from ..events import DeviceLimitReached, SessionBound, logger
from ..repository.repository import Loaded, Repository
from ..users.revoking import finish
from ..users.roster import Device, Entered, Roster, Since
from ..users.roster import enter as entered_in
from ..users.rosters import LOGIN, checked_user_id, new_device_id
from ..values.marks import split
from ..values.payload import Body, Owner
from .source import Contents


def owner_of(repository: Repository, body: Body, contents: Contents) -> Owner | None:
    """The user to bind a new session to."""
    user_id = contents.user_id or _login_of(repository, body)
    if user_id is None:
        return None
    until = repository.expiry.listed_until(body.values, body.lifetime, None)
    return Owner(user_id, new_device_id(), repository.now() // 1000, until)


def enter(repository: Repository, loaded: Loaded, since: Since, network: bytes) -> bool:
    """Enter a session in its user's roster. Returns False if the session may not be used.

    Call this before you send its token. Two round trips; one if it is in the roster already, none
    without a user. If sessions beyond ``SESSION_MAX_PER_USER`` end, that costs more.
    """
    record, owner = loaded.record, loaded.body.owner
    if owner is None:
        return True
    rosters, now = repository.rosters, repository.now() // 1000
    created = record.created_at // 1000
    device = Device(owner.device_id, record.key, created, now, owner.until, network=network)

    def step(roster: Roster) -> tuple[Roster, tuple[Entered, bool]]:
        entered = entered_in(roster, device, since, rosters.limit, rosters.policy)
        return entered.roster, (entered, entered.roster != roster)

    entered, is_new = rosters.change(owner.user_id, step)
    if entered.refused:
        return False
    if entered.over:
        repository.events.emit(DeviceLimitReached, owner.user_id, rosters.limit, entered.over)
    try:
        finish(repository, owner.user_id, entered.roster.ending, "limit" if entered.over else None)
    except LogoutUnconfirmed as error:
        logger.error("Sessions ended, but replicas have not confirmed it: %s", error)
    if is_new:
        repository.events.emit(SessionBound, owner.user_id, owner.device_id, record.key, "import")
    return True


def _login_of(repository: Repository, body: Body) -> str | None:
    raw = body.values.get(LOGIN)
    if raw is None:
        return None
    try:
        return checked_user_id(repository.codec.decode(split(raw)[1]))
    except (UnreadableRecord, ValueError):
        return None
