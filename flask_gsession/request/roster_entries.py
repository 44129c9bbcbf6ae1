"""Enters sessions in their user's roster, together with the writes that bind or move them.

``tests/simulation/roster_model.py`` explains the protocol and the order of its steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec.structs import replace

from ..errors import CutOff, LogoutUnconfirmed, StoreUnavailable, UnreadableRecord
from ..events import DeviceLimitReached, SessionBound, SessionUnbound, WriteDropped, logger
from ..repository.ending import delete_session
from ..repository.repository import Repository
from ..stores.base import Record
from ..stores.support import because
from ..users.labels import device_label
from ..users.revoking import end_revoked, finish, finish_if_possible
from ..users.roster import Device, Entered, Roster, Since, enter
from ..users.roster import touch as used
from ..users.rosters import LOGIN, network_of, new_device_id
from ..values.marks import split
from ..values.payload import Owner
from .admission import check_roster, drop_absent, refusal
from .following import catch_up
from .lifecycle import Lifecycle
from .ownership import NOBODY, known_user, owner_of
from .state import Binding, Entry, Wishes


class Revoked(Exception):
    """The session is no longer in its user's roster."""


def prepare_owner(
    life: Lifecycle,
    values: Mapping[str, bytes],
    changed: Collection[str],
    wishes: Wishes,
    old: Record | None,
) -> tuple[Owner | None, Entry | None]:
    """The owner to store with a session, and the changes to rosters that follow.

    Touches the roster now if that is due, and enters a session that keeps its key. Raises
    ``Revoked`` if the session is no longer in its user's roster, and an error for a refused
    sign-in.
    """
    owner = owner_of(life) if old is not None else None
    binding = wishes.binding
    if binding is None:
        binding = _implied_binding(life, owner, values, changed, old)
    if binding is not None and (owner is None or binding.user_id != owner.user_id):
        leaves = None if owner is None or old is None else (owner, old.key)
        if not binding.user_id:
            return None, Entry(leaves=leaves)
        now = life.repository.now() // 1000
        until = _listed_until(life, values, old, signs_in=wishes.rotation is not None)
        # Not fresh if the token stays, as in a socket handler: an attacker may have it as well.
        fresh = binding.fresh and (old is None or wishes.rotation is not None)
        signed_in = now + 1 if fresh else 0
        bound = Owner(binding.user_id, binding.device_id, now, until, signed_in=signed_in)
        if old is None or wishes.rotation is not None:
            return bound, Entry(binding=binding, leaves=leaves, unreachable=not wishes.rotation)
        entered = _enter(life, binding, old.key, until)
        if entered.refused:
            if wishes.binding is None and LOGIN not in changed:
                raise Revoked  # the session is older than the revocation
            raise refusal(life.repository, binding.user_id, entered.refused)
        assert entered.device is not None
        if life.repository.journaling is not None:
            life.repository.journaling.append_bound(old.key, bound.user_id, entered.device.id)
        return replace(bound, device_id=entered.device.id), Entry(leaves=leaves)
    if owner is None or old is None:
        return None, None
    if wishes.rotation is not None:
        now = life.repository.now() // 1000
        until = _listed_until(life, values, old, signs_in=wishes.sign_in)
        moved = replace(
            owner,
            seen=now,
            until=until,
            predecessor=old.key,
            signed_in=now + 1 if wishes.sign_in else owner.signed_in,
        )
        moves = old.key, owner.predecessor or old.key
        return moved, Entry(moves=moves, unreachable=not wishes.rotation)
    if life.repository.now() < (owner.seen + life.repository.settings.seen_interval) * 1000:
        return owner, None
    try:
        return touch(life, owner, values, old), None
    except CutOff:  # the next save that reaches the centre touches it
        return owner, None


def enter_roster(life: Lifecycle) -> bool:
    """Enter a session with a new key in its user's roster, before its token is sent.

    If the roster refuses a rotated session, this ends the session and returns False. If the roster
    refuses a sign-in, this ends the session and raises.
    """
    entry, record, owner = life.entry, life.seen.record, owner_of(life)
    if entry is None:
        return True
    if record is None or record.key != entry.key:  # it wasn't stored
        life.entry = None
        return True
    repository = life.repository
    if owner is not None and (entry.binding is not None or entry.moves):
        if entry.binding is not None:
            entered = _enter(life, entry.binding, record.key, owner.until)
        else:
            entered = _enter_rotated(life, owner, record.key, entry.moves)
        if entered.refused:
            _discard(life, record)
            if entry.leaves is not None:
                repository.rosters.leave(entry.leaves[0], entry.leaves[1])
            if entry.binding is None:
                life.ended = True
                repository.events.emit(WriteDropped, record.key, "revoked before it was rotated")
                return False
            raise refusal(repository, owner.user_id, entered.refused)
    life.entry = None
    if entry.leaves is not None:
        left, key = entry.leaves
        repository.rosters.leave(left, key)
        repository.events.emit(SessionUnbound, left.user_id, left.device_id)
    return True


def _discard(life: Lifecycle, record: Record) -> bool:
    """Delete a refused session, whose token no client has. Returns False after an outage."""
    life.forget()  # before the delete, which may be interrupted
    life.cookie = "keep" if life.presented().checked is None else "delete"
    try:
        with because("refused"):
            delete_session(life.repository, record.key, leave_roster=False)
    except (StoreUnavailable, UnreadableRecord) as error:
        logger.warning("Session %s, which no client can use, stays: %s", record.key, error)
        return False
    return True


def take_back(life: Lifecycle) -> None:
    """End a stored session whose token no response carries, since its roster couldn't be changed.

    Otherwise, its entry could take the place of another device. Three round trips. Never raises for
    an outage.
    """
    entry, record, owner = life.entry, life.seen.record, owner_of(life)
    if entry is None or record is None or owner is None or not entry.unreachable:
        return
    if record.key == entry.key and _discard(life, record):
        life.repository.rosters.leave(owner, record.key, *entry.moves)
        if entry.leaves is not None:
            life.repository.rosters.leave(*entry.leaves)


def _enter(life: Lifecycle, binding: Binding, key: str, until: int) -> Entered:
    """Enter the session under ``key``, and end the oldest sessions over the limit."""
    repository, user_id = life.repository, binding.user_id
    rosters, now = repository.rosters, repository.now() // 1000
    device = Device(
        binding.device_id,
        key,
        now,
        now,
        until,
        binding.label or _label(life),
        _network(life),
        binding.tags,
        binding.remembered,
    )

    def step(roster: Roster) -> tuple[Roster, Entered]:
        entered = enter(roster, device, binding.since, rosters.limit, rosters.policy)
        return entered.roster, entered

    entered = rosters.change(user_id, step, binding.found)
    if entered.refused == "full":
        drop_absent(repository, user_id, entered.roster)
        entered = rosters.change(user_id, step)
    if entered.refused:
        return entered
    if entered.over:
        repository.events.emit(DeviceLimitReached, user_id, rosters.limit, entered.over)
        if repository.settings.max_per_user is None:
            logger.warning("A user has more than %d sessions: the oldest ends", rosters.limit)
    _finish(repository, user_id, entered.roster, "limit" if entered.over else None)
    device_id = entered.device.id if entered.device else ""
    repository.events.emit(SessionBound, user_id, device_id, key, _how(binding))
    return entered


def _how(binding: Binding) -> str:
    if binding.since.epoch is None:
        return "earlier version"
    return "sign-in" if binding.fresh else "remember-me"


def _finish(repository: Repository, user_id: str, roster: Roster, reason: str | None) -> None:
    try:
        finish(repository, user_id, roster.ending, reason)
    except LogoutUnconfirmed as error:
        logger.error("Sessions ended, but replicas have not confirmed it: %s", error)


def _enter_rotated(life: Lifecycle, owner: Owner, key: str, before: Collection[str]) -> Entered:
    return _touch(life, owner, key, before, life.repository.now() // 1000)


def touch(life: Lifecycle, owner: Owner, values: Mapping[str, bytes], old: Record) -> Owner:
    """The owner to store with a session that keeps its key. Raises ``Revoked``."""
    now, until = life.repository.now() // 1000, _listed_until(life, values, old)
    before = () if owner.predecessor is None else (owner.predecessor,)
    touched = replace(owner, seen=now, until=until, predecessor=None)
    entered = _touch(life, touched, old.key, before, now)
    if not entered.refused:
        return touched
    finish_if_possible(life.repository, owner.user_id, entered.roster.ending)
    raise Revoked


def _touch(life: Lifecycle, owner: Owner, key: str, before: Collection[str], now: int) -> Entered:
    repository, network = life.repository, _network(life)
    interval = repository.settings.seen_interval

    def step(roster: Roster) -> tuple[Roster, Entered]:
        there = roster.by_id(owner.device_id)
        if (
            there is not None
            and not there.ending
            and there.key == key
            and now < there.seen + interval
            and owner.until <= there.expires
        ):
            return roster, Entered(roster, device=there)  # another request has touched it
        entered = used(
            roster,
            owner.device_id,
            key,
            before,
            seen=now,
            expires=owner.until,
            network=network,
        )
        return entered.roster, entered

    entered = repository.rosters.change(owner.user_id, step)
    if not entered.refused:
        finish_if_possible(repository, owner.user_id, entered.roster.ending)
    return entered


def _implied_binding(
    life: Lifecycle,
    owner: Owner | None,
    values: Mapping[str, bytes],
    changed: Collection[str],
    old: Record | None,
) -> Binding | None:
    """The binding that Flask-Login's key implies: it was set now, or by an earlier version."""
    if LOGIN not in changed and (owner is not None or LOGIN not in values):
        return None
    if life.wishes.binding is not None:  # a later write makes it
        return None
    if not hasattr(life.app, "login_manager"):
        return None
    user_id = _login_of(life, values)
    if user_id is None:
        return NOBODY if owner is not None else None
    if owner is not None and owner.user_id == user_id:
        return None
    if LOGIN in changed or old is None:
        found = check_roster(life, user_id)
        return Binding(user_id, new_device_id(), Since(found.roster.epoch), found=found)
    # The sign-in is not older than the session.
    return Binding(user_id, new_device_id(), Since(None, old.created_at))


def _login_of(life: Lifecycle, values: Mapping[str, bytes]) -> str | None:
    raw = values.get(LOGIN)
    if raw is None:
        return None
    try:
        return known_user(life.repository.codec.decode(split(raw)[1]))
    except UnreadableRecord:
        return None


def is_touch_due(life: Lifecycle) -> bool:
    """Whether to save an unchanged session, so that the save touches its roster."""
    body, values = life.seen.body, life.values.stored
    owner = None if body is None else body.owner
    if owner is None:
        return (
            LOGIN in values
            and _implied_binding(life, None, values, (), life.seen.record) is not None
        )
    repository = life.repository
    return repository.clock() >= owner.seen + repository.settings.seen_interval


def is_revoked(life: Lifecycle) -> bool:
    """After ``Revoked``: whether the session was really revoked. False if it was moved.

    A revoked session ends. One round trip, one more to end it.
    """
    seen = life.seen
    assert seen.record is not None
    key, owner = seen.record.key, owner_of(life)
    if not catch_up(life):
        return True
    there, now = life.seen.record, owner_of(life)
    if there is not None and (there.key != key or (owner is not None and now is None)):
        return False
    if now is not None:
        end_revoked(life.repository, key, now)
    elif there is not None:  # signed in with an earlier version, before a revocation
        with because("not a member"):
            delete_session(life.repository, key, leave_roster=False)
    return True


def _listed_until(
    life: Lifecycle, values: Mapping[str, bytes], old: Record | None, *, signs_in: bool = False
) -> int:
    return life.repository.expiry.listed_until(values, life.lifetime, old, signs_in=signs_in)


def _network(life: Lifecycle) -> bytes:
    return b"" if life.request is None else network_of(life.request.remote_addr)


def _label(life: Lifecycle) -> str:
    """A name for the device, where the application gave none."""
    if life.request is None or not life.repository.settings.device_labels:
        return ""
    return device_label(life.request.user_agent.string)
