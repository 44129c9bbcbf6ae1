"""Ends the sessions that a roster marks as ending."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import LogoutUnconfirmed, StoreUnavailable, UnreadableRecord
from ..events import DeviceRevoked, SessionRevoked, logger
from ..repository.ending import delete_session, delete_sessions
from ..repository.repository import Loaded, Repository
from ..stores.support import because
from ..values.payload import Owner
from .roster import Device, drop


def finish(
    repository: Repository,
    user_id: str,
    ending: Collection[Device],
    reason: str | None = None,
    by: str | None = None,
) -> None:
    """Delete the sessions of these devices, then drop them from the user's roster.

    Raises ``StoreUnavailable`` if it was interrupted; the next access to the roster finishes it.
    Raises ``LogoutUnconfirmed`` last: all sessions have ended, but too few replicas confirmed it,
    so these devices stay in the roster. Two round trips and the deletes.
    """
    if not ending:
        return
    unconfirmed: LogoutUnconfirmed | None = None
    keys = {device.key for device in ending}
    deleting = delete_sessions(repository, [device.key for device in ending])
    for device, delete in zip(ending, deleting, strict=True):
        try:
            with because(reason or "revoked", by):
                ended = delete()
        except LogoutUnconfirmed as error:
            unconfirmed, ended = error, True
            keys.remove(device.key)
        except UnreadableRecord as error:
            repository.refusals.note(error.reason, device.key, error.detail)
            continue
        if ended:
            repository.events.emit(SessionRevoked, device.key)
            repository.events.emit(DeviceRevoked, user_id, device.id, device.key, reason, by)
    if keys:
        repository.rosters.change(user_id, lambda roster: (drop(roster, keys), None))
    if unconfirmed is not None:
        raise unconfirmed


def finish_if_possible(
    repository: Repository, user_id: str, ending: Collection[Device], reason: str | None = None
) -> None:
    """Finish a revocation that another process began. In an outage, log a warning instead."""
    try:
        finish(repository, user_id, ending, reason)
    except StoreUnavailable as error:
        logger.warning("Sessions of a user that were revoked have not ended yet: %s", error)


def is_member(repository: Repository, loaded: Loaded) -> bool:
    """Whether a session that is stored before it enters its user's roster has been entered by now.

    If it hasn't, the session is deleted. One round trip, one more to delete it. Raises
    ``StoreUnavailable``.
    """
    record, owner = loaded.record, loaded.body.owner
    if owner is None:
        return True
    there = repository.rosters.look(owner.user_id).roster.by_id(owner.device_id)
    if there is not None and not there.ending and there.key in (record.key, owner.predecessor):
        return True
    end_revoked(repository, record.key, owner)
    return False


def end_revoked(repository: Repository, key: str, owner: Owner) -> None:
    """Delete the session under ``key``, which isn't in its user's roster."""
    try:
        with because("not a member"):
            ended = delete_session(repository, key, leave_roster=False)
    except (LogoutUnconfirmed, UnreadableRecord):
        ended = True
    if ended:
        details = owner.user_id, owner.device_id, key, "not a member", None
        repository.events.emit(DeviceRevoked, *details)
