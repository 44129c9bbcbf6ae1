"""One write of a session: sends it to the store, and adopts the stored state."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from msgspec.structs import replace
from werkzeug.exceptions import HTTPException

from ..errors import CutOff, GSessionError, LogoutUnconfirmed, StoreUnavailable
from ..events import SessionCreated, SessionDestroyed, SessionRotated, SessionSaved, SessionUnbound
from ..repository.permanent import PERMANENT, is_permanent
from ..stores.base import Record
from ..stores.interrupts import signal_interruption
from ..users.rosters import LOGIN
from ..values.merge import Change
from ..values.payload import Body, Owner
from .ending import end_old_session
from .joining import close_join, join_user, note_join
from .lifecycle import CONFIRMED, NO_ATTEMPTS, NO_CHANGES, Lifecycle, worth_keeping
from .roster_entries import enter_roster, is_touch_due, prepare_owner, touch
from .state import NO_WISHES, Attempt, Entry, HidesFields, Seen, Wishes


class Edit(HidesFields, frozen=True, gc=False):
    """The values to store over the state that was ``seen``.

    ``values`` are all values in encoded form. ``changes`` are the request's own among them, which
    stay pending until they are stored. Then ``settle`` is called, under the mutex.
    """

    seen: Seen
    values: dict[str, bytes]
    changes: Mapping[str, Change]
    wishes: Wishes = NO_WISHES
    settle: Callable[[], None] | None = None


#: Event types with their details, to emit when a write is complete; missing confirmations too.
Written = tuple[list[tuple[Any, ...]], LogoutUnconfirmed | None]


def store(life: Lifecycle, step: Edit, lost: int) -> Written:
    """Send one write, and adopt the stored state. The caller holds the mutex.

    ``lost``: how many races this write has lost so far.
    """
    repository, wishes, changes = life.repository, step.wishes, step.changes
    old, values = step.seen.record, step.values
    if old is not None and not worth_keeping(values) and _is_emptied(life, step):
        return _end(life, old)
    before, stored, has_large = life.values.stored, values, life.has_large
    others = sys.maxsize if old is None else len(old.payload)
    if has_large or repository.large.is_any_too_long(values, changes, others):
        body = Body(values, life.lifetime, has_large=True)
        absolute = old.absolute_expires_at if old else None
        stored = life.unreferenced.write_large(body, absolute, before)
        has_large = life.has_large
    body = life.body(stored, has_large=has_large)
    entry: Entry | None = None
    joining: Collection[str] = ()
    plain = wishes.binding is None and wishes.rotation is None and LOGIN not in changes
    has_user = body.owner is not None or LOGIN in values
    # Most saves of a bound session have nothing to do for its user.
    if not plain or (has_user and (body.owner is None or is_touch_due(life))):
        body, entry, joining = _prepare_user(life, step, body)
        stored = body.values
    if body.joins or repository.user_keys:
        note_join(life, body, old)
    toggled = PERMANENT in changes and (is_permanent(stored) != is_permanent(before))
    restart = toggled or wishes.lifetime is not None
    token: str | None = None
    if old is None:
        token, record = repository.records.draft_new(body)
    elif wishes.rotation is not None:
        signs_in = wishes.sign_in or (entry is not None and entry.binding is not None)
        renew = restart or life.renews
        token, record = repository.records.draft_rotated(old, body, renew=renew, signs_in=signs_in)
    else:
        record = repository.records.draft_next(old, body, restart, life.renews)
        if body.owner is not None and record.idle_expires_at > body.owner.until * 1000:
            record = _touch(life, body, body.owner, old, record, restart)
    if stored is not values:
        changes = _as_stored(changes, values, stored)
    if entry is not None:
        entry = replace(entry, key=record.key)
    pending = step.settle is None
    attempt = Attempt(record, token, body, changes if pending else NO_CHANGES, wishes, entry)
    earlier = life.attempts
    life.attempts = {**earlier, record.version: attempt} if earlier else {record.version: attempt}
    if entry is not None:
        life.entry = entry
    unconfirmed = None
    try:
        if old is None:
            repository.create(record)
        elif wishes.rotation is not None:
            unconfirmed = repository.rotate(
                old, record, body, wishes.rotation, life.lease, shorten=restart
            )
        else:
            repository.save(old, record, body, life.lease, restart)
    except (GSessionError, HTTPException) as error:
        # After any other exception, or any that a signal handler raised, the outcome is unknown.
        if not isinstance(error, StoreUnavailable) and signal_interruption(error) is None:
            attempts = dict(life.attempts)
            del attempts[record.version]
            life.attempts = attempts
            life.entry = None
        raise
    if pending:
        life.values.mark_saved(stored, changes)
    else:
        _take_over(life, step, stored, changes)
    for key in joining:
        life.values.drop(key)
    current = step.seen.token
    if token is not None:
        current, life.cookie = token, "set"
    elif current is not None and old is not None:
        moved = record.idle_expires_at != old.idle_expires_at
        if toggled or (moved and is_permanent(stored)):
            life.cookie = "set"
    life.seen = Seen(current, record, body, step.seen.presented)
    if pending and life.wishes is not NO_WISHES:
        life.wishes = _left(life.wishes, wishes)
    # This write replaced the version that earlier attempts meant to replace, so they failed.
    life.attempts = NO_ATTEMPTS
    if has_large:
        life.unreferenced.release_replaced(before, stored)
    if life.entry is not None and not enter_roster(life):
        return [], None
    if life.joined is not None:
        close_join(life)
    if old is None:
        return [(SessionCreated, record.key)], None
    happened: list[tuple[Any, ...]] = [(SessionSaved, record.key, len(record.payload), lost)]
    if token is not None:
        happened.insert(0, (SessionRotated, record.key, old.key))
    return happened, unconfirmed


def _is_emptied(life: Lifecycle, step: Edit) -> bool:
    """Whether the request emptied the session, so that it ends instead of being stored."""
    if step.settle is not None or life.must_stay():
        return False
    binding, owner = step.wishes.binding, life.seen.body and life.seen.body.owner
    if binding is not None:
        bound = bool(binding.user_id)
    else:  # a user stays signed in, although the last message was shown
        bound = owner is not None and LOGIN not in step.changes
    changed = owner is None or step.changes.keys() - {CONFIRMED} or step.wishes.cleared
    return not bound and bool(changed)


def _prepare_user(
    life: Lifecycle, step: Edit, body: Body
) -> tuple[Body, Entry | None, Collection[str]]:
    """The body for this user, the changes to rosters, and the keys that join the user's values."""
    old = step.seen.record
    body.owner, entry = prepare_owner(life, step.values, step.changes, step.wishes, old)
    joining: Collection[str] = ()
    if body.joins or life.behind is not None or life.repository.user_keys:
        joining = join_user(life, body, step.changes, old)
    if joining:
        owner, has_large = body.owner, body.has_large
        body = life.body(_without(body.values, joining), has_large=has_large)
        body.owner, body.joins = owner, ()
    return body, entry, joining


def _touch(
    life: Lifecycle, body: Body, owner: Owner, old: Record, record: Record, restart: bool
) -> Record:
    """The record of a session that is renewed for longer than its roster knows."""
    try:
        body.owner = touch(life, owner, body.values, old)
        return life.repository.records.draft_next(old, body, restart, life.renews)
    except CutOff:
        end = max(old.idle_expires_at, owner.until * 1000)
        return record._replace(idle_expires_at=min(record.idle_expires_at, end))


def _left(wishes: Wishes, done: Wishes) -> Wishes:
    """The rotation and the binding that are still wished."""
    rotation = None if done.rotation is not None else wishes.rotation
    binding = None if done.binding is not None else wishes.binding
    if rotation is None and binding is None:
        return NO_WISHES
    return Wishes(rotation=rotation, binding=binding, sign_in=wishes.sign_in)


def _without(values: dict[str, bytes], keys: Collection[str]) -> dict[str, bytes]:
    return {key: raw for key, raw in values.items() if key not in keys}


def _take_over(
    life: Lifecycle, step: Edit, stored: dict[str, bytes], changes: Mapping[str, Change]
) -> None:
    """One value was replaced in the store. Changes of other keys stay pending."""
    values = life.values
    if life.trace is not None:
        for key, change in changes.items():
            life.trace.stored(key, change.base, change.mine)
    changed = {key: values.has_changed(key) for key in changes}
    values.rebase(stored)
    assert step.settle is not None
    if not any(changed.values()):
        step.settle()
    if not worth_keeping(stored) and (step.seen.body is None or step.seen.body.owner is None):
        life.wish(cleared=True)  # if it is still empty then, it ends with the response


def _end(life: Lifecycle, old: Record) -> Written:
    """The request emptied the session: end it, in the version it saw."""
    unconfirmed: LogoutUnconfirmed | None = None
    end_old_session(life)
    try:
        life.repository.end(old, life.seen.body, life.lease)
    except LogoutUnconfirmed as error:
        unconfirmed = error
    if life.seen.body is not None and life.seen.body.owner is not None:
        owner = life.seen.body.owner
        life.repository.rosters.leave(owner, old.key)
        life.repository.events.emit(SessionUnbound, owner.user_id, owner.device_id)
    before = life.values.stored if life.has_large else None
    life.forget()
    life.cookie = "delete"
    if before is not None:
        life.unreferenced.release_replaced(before, None)
    return [(SessionDestroyed, old.key)], unconfirmed


def _as_stored(
    changes: Mapping[str, Change], merged: Mapping[str, bytes], stored: Mapping[str, bytes]
) -> Mapping[str, Change]:
    """The changes, with references in place of large values."""
    return {
        key: change if merged.get(key) is not change.mine else Change(change.base, stored.get(key))
        for key, change in changes.items()
    }
