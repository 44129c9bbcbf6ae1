"""``ext.users``: the sessions of a user, and how to end them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from flask import current_app
from msgspec.structs import replace

from ..errors import (
    RevocationUnfinished,
    SessionEnded,
    StoreUnavailable,
)
from ..events import UserValuesForgotten, logger
from ..repository.repository import Repository
from ..repository.user_values import UserValuesRecord
from ..request.admission import note_own_revocation, sign_in_since
from ..request.checks import check_not_in_retried_code
from ..request.ending import destroy
from ..request.lifecycle import Lifecycle
from ..request.loading import load
from ..request.own_session import start_own_session
from ..request.ownership import (
    device_id_of,
    stored_device_of,
    user_id_of,
)
from ..request.saving import bind_earlier
from ..request.session import SessionData, lifecycle_of
from ..request.user_values import values_of
from .rebuilding import rebuild
from .revoking import finish
from .roster import Device, Roster, Since, mark_ending
from .rosters import checked_user_id, network_text

_utc = datetime.fromtimestamp
_ENDING = "Revoking the session of this request"


@dataclass(frozen=True, slots=True)
class UserDevice:
    """One session of a user: a browser, or another client. Times are UTC.

    ``id`` stays the same through rotations. ``current``: whether it is this request's session.
    ``network``: the network of the last noted request, such as ``"203.0.113.0/24"``.
    ``last_seen_at`` is up to ``SESSION_SEEN_INTERVAL`` old. ``expires_at``: when it ends at the
    latest if it isn't used again. ``remembered``: signed in by a remember-me cookie.
    """

    id: str
    current: bool
    label: str | None
    tags: tuple[str, ...]
    network: str | None
    created_at: datetime
    last_seen_at: datetime
    expires_at: datetime
    remembered: bool
    handle: str


class Users:
    """The sessions that are bound to the users of an application, from ``ext.users``.

    Use it in requests, and in jobs and commands with an application context. ``user_id`` is the
    argument of ``session.bind``; with Flask-Login, the result of the user's ``get_id()``. All
    methods raise ``ValueError`` for an invalid id, and ``StoreUnavailable`` (503).
    """

    def __init__(
        self,
        repository: Callable[[], Repository],
        session: Callable[[], SessionData | None],
    ) -> None:
        self._repository = repository
        self._session = session

    def devices(self, user_id: str | int) -> list[UserDevice]:
        """The user's sessions, the last seen first. One round trip for all of them.

        A session that this request binds is listed once it is saved. A session that ended without
        the roster's knowledge, as after an outage, is listed until it would have expired. Sessions
        that Flask-Login signed in before you upgraded are missing until they are used, or until
        ``rebuild``.
        """
        user_id = checked_user_id(user_id)
        repository = self._repository()
        roster = repository.rosters.look(user_id).roster.without_expired(repository.now())
        life = self._life()
        current = device_id_of(life) if life is not None and user_id_of(life) == user_id else None
        latest = sorted(roster.members, key=lambda device: device.seen, reverse=True)
        return [_shown(device, device.id == current) for device in latest]

    @contextmanager
    def login(self, user_id: str | int) -> Iterator[None]:
        """A block in which you check the password and bind the session to that user.

        If the user's sessions are revoked during the block, the sign-in is refused. Without the
        block, revocations since the start of the request count, plus 5 seconds because clocks
        differ between servers. One round trip.
        """
        user_id = checked_user_id(user_id)
        rosters = self._repository().rosters
        with sign_in_since(rosters, user_id, rosters.look(user_id).roster.epoch):
            yield

    def revoke(
        self,
        user_id: str | int,
        device_id: str,
        *,
        reason: str | None = None,
        by: str | None = None,
    ) -> bool:
        """End one session of the user. Returns whether there was one.

        When this returns, no request gets the session. ``reason`` and ``by`` are for the event
        ``DeviceRevoked``; ``by`` is the signed-in user by default. Raises ``RevocationUnfinished``
        if it was interrupted; then repeat it. Five round trips.
        """
        user_id = checked_user_id(user_id)
        _check_device_id(device_id)
        by, life = self._by(by), self._life()
        if life is not None and stored_device_of(life, user_id) != device_id:
            life = None
        if life is not None:
            check_not_in_retried_code(life, _ENDING)

        def step(roster: Roster) -> tuple[Roster, tuple[bool, Roster]]:
            after = mark_ending(roster, {device_id})
            return after, (roster.by_id(device_id) is not None, after)

        found, after = self._repository().rosters.change(user_id, step)
        if found:
            self._finish(user_id, after, reason, by)
            if life is not None:
                _end_current_session(life, user_id)
        return found

    def revoke_others(
        self,
        user_id: str | int | None = None,
        device_id: str | None = None,
        *,
        reason: str | None = None,
        by: str | None = None,
    ) -> int:
        """End all sessions of the user but one. Returns how many ended.

        By default, the user is the signed-in user, and this request's session stays. Also refuses
        sign-ins of the user that are under way. Raises ``SessionEnded`` if the session to keep has
        ended itself. Otherwise as ``revoke_all``.
        """
        if user_id is not None:
            user_id = checked_user_id(user_id)
        life = self._life()
        if life is not None and device_id is None:
            bind_earlier(life)
        current = None if life is None else user_id_of(life)
        if user_id is None:
            user_id = current
            if user_id is None:
                raise ValueError("user_id is None, but no user is signed in to this session")
        if device_id is None:
            if life is None or current != user_id:
                raise ValueError("device_id is None, but this session is not bound to that user")
            if life.wishes.binding is None:
                device_id = device_id_of(life)
        else:
            _check_device_id(device_id)
        return self._revoke_all(user_id, device_id, reason, by)

    def revoke_all(
        self,
        user_id: str | int,
        *,
        tags: Collection[str] | None = None,
        reason: str | None = None,
        by: str | None = None,
    ) -> int:
        """End all sessions of the user, including this request's. Returns how many ended.

        When this returns, no request gets any of them, and sign-ins that were under way fail.
        ``tags``: only the sessions that were bound with one of these tags. ``reason`` and ``by`` as
        in ``revoke``. Raises ``RevocationUnfinished`` if it was interrupted; repeat it, or the
        user's next sign-in finishes it. Four round trips, and the deletes.
        """
        if isinstance(tags, str):
            raise ValueError("tags is a str; allowed: a list of str, or None")
        return self._revoke_all(checked_user_id(user_id), None, reason, by, tags)

    def forget(self, user_id: str | int) -> bool:
        """Delete the user's values, as in ``session.shared``. Returns whether there were any.

        For the deletion of an account, call ``revoke_all`` first: a session that is still signed in
        can store values again, and so can a request that is running now. Revoking and signing out
        delete no values. One round trip.
        """
        user_id = checked_user_id(user_id)
        found = UserValuesRecord(self._repository(), user_id).forget()
        session = self._session()
        if session is not None and session.owner == user_id:
            values_of(lifecycle_of(session), user_id).forget()
        if found:
            self._repository().events.emit(UserValuesForgotten, user_id, self._by(None))
        return found

    def rebuild(self, user_id: str | int | None = None, *, replace_foreign: bool = False) -> int:
        """Repair rosters from the sessions in the store. Returns how many sessions were entered.

        A roster that is damaged or lost gets all live sessions that are bound to its user. Sessions
        that Flask-Login signed in before you upgraded are bound, and added to readable rosters as
        well. Nothing else changes in a readable roster. ``user_id`` None: the rosters of all users.
        Scans the whole store.

        A session from before you upgraded isn't added if its user's roster is full, or was
        damaged: that roster no longer says which sessions were revoked. Such a session ends at its
        next save or renewal.

        A roster that needs another encryption key, or a newer version, raises ``RosterUnreadable``,
        after the others were repaired. With ``replace_foreign`` it counts as damaged: use that once
        no worker can read it. Its readable sessions stay, all others end.
        """
        only = None if user_id is None else checked_user_id(user_id)
        return rebuild(self._repository(), only, foreign=replace_foreign)

    def _revoke_all(
        self,
        user_id: str,
        keep: str | None,
        reason: str | None,
        by: str | None,
        tags: Collection[str] | None = None,
    ) -> int:
        rosters, life, by = self._repository().rosters, self._life(), self._by(by)
        current = None if life is None else stored_device_of(life, user_id)
        if life is not None and current not in (None, keep):
            check_not_in_retried_code(life, _ENDING)

        def step(roster: Roster) -> tuple[Roster, tuple[Roster, Roster]]:
            if keep is not None and keep not in {device.id for device in roster.members}:
                return roster, (roster, roster)
            after = rosters.revoke_all(roster, keep, tags)
            return after, (roster, after)

        before, after = rosters.change(user_id, step)
        if before is after:
            raise SessionEnded
        rosters.own.add(user_id, after.epoch)
        if life is not None:
            _keep_sign_in_valid(life, user_id, before, after.epoch)
        self._finish(user_id, after, reason, by)
        if life is not None and current in {device.id for device in after.ending}:
            _end_current_session(life, user_id)
        return len(after.ending)

    def _finish(self, user_id: str, roster: Roster, reason: str | None, by: str | None) -> None:
        cookies = self._repository().settings.remember == "cookie"
        if cookies and hasattr(current_app, "login_manager"):
            logger.warning(
                "Sessions of a user were revoked, but a remember-me cookie of Flask-Login can sign "
                "the user in again: set SESSION_REMEMBER to 'session'"
            )
        try:
            finish(self._repository(), user_id, roster.ending, reason, by)
        except StoreUnavailable as error:
            raise RevocationUnfinished(
                f"up to {len(roster.ending)} sessions are still to end: {error}. Repeat the call"
            ) from error

    def _by(self, by: str | None) -> str | None:
        """The signed-in user of this request, unless the caller passes a name."""
        session = self._session() if by is None else None
        return by if session is None else session.owner

    def _life(self) -> Lifecycle | None:
        """The lifecycle of this request's session, with the session loaded."""
        session = self._session()
        if session is None:
            return None
        session.accessed = True
        life = lifecycle_of(session)
        load(life)
        return life


def _end_current_session(life: Lifecycle, user_id: str) -> None:
    """End this request's session, which was revoked, but not a sign-in of another user."""
    binding = life.wishes.binding
    if binding is None or binding.user_id in ("", user_id):
        destroy(life)
    else:
        with life.mutex:
            start_own_session(life)


def _keep_sign_in_valid(life: Lifecycle, user_id: str, before: Roster, epoch: int) -> None:
    """Keep a pending sign-in of this request valid after its own revocation."""
    note_own_revocation(life, user_id, before, epoch)
    binding = life.wishes.binding
    if binding is not None and binding.user_id == user_id and binding.since.epoch == before.epoch:
        life.wish(binding=replace(binding, since=Since(epoch), found=None))


def _shown(device: Device, current: bool) -> UserDevice:
    return UserDevice(
        device.id,
        current,
        device.label or None,
        device.tags,
        network_text(device.network),
        _utc(device.created, UTC),
        _utc(device.seen, UTC),
        _utc(device.expires, UTC),
        device.remembered,
        device.key,
    )


def _check_device_id(device_id: object) -> None:
    if not isinstance(device_id, str):
        raise ValueError(f"device_id is of type {type(device_id).__name__}; it must be text")
