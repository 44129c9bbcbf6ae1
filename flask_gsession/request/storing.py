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
from .lifecycle import ABOUT_ITSELF, CONFIRMED, NO_ATTEMPTS, Lifecycle, worth_keeping
from .rebasing import drop
from .roster_entries import enter_roster, is_touch_due, prepare_owner, touch
from .state import NO_WISHES, Attempt, Entry, HidesFields, Seen, Wishes
from .tracking import NO_CHANGES


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


_NO_KEYS: Collection[str] = ()

#: Event types with their details, to emit when a write is complete; missing confirmations too.
Written = tuple[list[tuple[Any, ...]], LogoutUnconfirmed | None]


def store(life: Lifecycle, step: Edit, lost: int) -> Written:
    """Send one write, and adopt the stored state. The caller holds the mutex.

    ``lost``: how many races this write has lost so far.
    """
    repository, wishes, changes = life.repository, step.wishes, step.changes
    old, values, before = step.seen.record, step.values, life.values.stored
    if old is not None and values.keys() <= ABOUT_ITSELF and _is_emptied(life, step):
        return _end(life, old)
    stored, seen_body = values, step.seen.body
    largest = sys.maxsize if old is None else len(old.payload)
    has_large = life.written_large is not None or (seen_body is not None and seen_body.has_large)
    if has_large or repository.large.is_any_too_long(values, changes, largest):
        stored, has_large = _write_large(life, step)
    body = life.body(stored, has_large=has_large)
    entry, joining = None, _NO_KEYS
    if wishes is not NO_WISHES or LOGIN in changes or LOGIN in values or body.owner is not None:
        body, entry, joining = _prepare_user(life, step, body)
    if body.joins or repository.user_keys:
        note_join(life, body, old)
    toggled = PERMANENT in changes and (is_permanent(body.values) != is_permanent(before))
    restart, token = toggled or wishes.lifetime is not None, None
    if old is None or wishes.rotation is not None:
        token, record = _draft_with_token(life, step, body, entry, restart)
    else:
        record = repository.records.draft_next(old, body, restart, life.renews)
        if body.owner is not None and record.idle_expires_at > body.owner.until * 1000:
            record = _touch(life, body, body.owner, old, record, restart)
    if body.values is not values:
        changes = _as_stored(changes, values, body.values)
    if entry is not None:
        entry = replace(entry, key=record.key)
    noted = changes if step.settle is None else NO_CHANGES
    attempt = Attempt(record, token, body, noted, wishes, entry)
    unconfirmed = _send(life, old, attempt, restart)
    _adopt(life, step, attempt, changes, joining, toggled)
    if has_large:
        life.unreferenced.release_replaced(before, body.values)
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


def _write_large(life: Lifecycle, step: Edit) -> tuple[dict[str, bytes], bool]:
    """The values with references to the large ones, and whether there are any."""
    old, body = step.seen.record, Body(step.values, life.lifetime, has_large=True)
    absolute = old.absolute_expires_at if old else None
    stored = life.unreferenced.write_large(body, absolute, life.values.stored)
    return stored, life.has_large


def _draft_with_token(
    life: Lifecycle, step: Edit, body: Body, entry: Entry | None, restart: bool
) -> tuple[str, Record]:
    """The token and record of a new session, or of one that is rotated."""
    records, old, wishes = life.repository.records, step.seen.record, step.wishes
    if old is None:
        return records.draft_new(body)
    signs_in = wishes.sign_in or (entry is not None and entry.binding is not None)
    return records.draft_rotated(old, body, renew=restart or life.renews, signs_in=signs_in)


def _send(
    life: Lifecycle, old: Record | None, attempt: Attempt, restart: bool
) -> LogoutUnconfirmed | None:
    """Note the write, and send it.

    Returns ``LogoutUnconfirmed`` if replicas may still accept the old key.
    """
    repository, record, grace = life.repository, attempt.record, attempt.wishes.rotation
    earlier = life.attempts
    life.attempts = {**earlier, record.version: attempt} if earlier else {record.version: attempt}
    if attempt.entry is not None:
        life.entry = attempt.entry
    try:
        if old is None:
            repository.create(record)
        elif grace is None:
            repository.save(old, record, attempt.body, life.lease, restart)
        else:
            return repository.rotate(old, record, attempt.body, grace, life.lease, shorten=restart)
    except (GSessionError, HTTPException) as error:
        # After any other exception, or any that a signal handler raised, the outcome is unknown.
        if not isinstance(error, StoreUnavailable) and signal_interruption(error) is None:
            attempts = dict(life.attempts)
            del attempts[record.version]
            life.attempts = attempts
            life.entry = None
        raise
    return None


def _adopt(
    life: Lifecycle,
    step: Edit,
    attempt: Attempt,
    changes: Mapping[str, Change],
    joining: Collection[str],
    toggled: bool,
) -> None:
    """Continue with the state that was stored.

    ``joining``: the keys that left the session. ``toggled``: it changed ``permanent``.
    """
    old, record, stored = step.seen.record, attempt.record, attempt.body.values
    if step.settle is None:
        life.values.rebase(stored, saved=changes)
    else:
        _adopt_one_key(life, step, stored, changes)
    for key in joining:
        drop(life.values, key)
    current = step.seen.token
    if attempt.token is not None:
        current, life.cookie = attempt.token, "set"
    elif current is not None and old is not None:
        moved = record.idle_expires_at != old.idle_expires_at
        if toggled or (moved and is_permanent(stored)):
            life.cookie = "set"
    life.seen = Seen(current, record, attempt.body, step.seen.presented)
    if step.settle is None and life.wishes is not NO_WISHES:
        life.wishes = _left(life.wishes, step.wishes)
    # This write replaced the version that earlier attempts meant to replace, so they failed.
    life.attempts = NO_ATTEMPTS


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
    old, wishes = step.seen.record, step.wishes
    if wishes.binding is None and wishes.rotation is None and LOGIN not in step.changes:
        # Most saves of a bound session have nothing to do for its user.
        is_of_one = body.owner is not None or LOGIN in step.values
        if not is_of_one or (body.owner is not None and not is_touch_due(life)):
            return body, None, _NO_KEYS
    body.owner, entry = prepare_owner(life, step.values, step.changes, wishes, old)
    joining = _NO_KEYS
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
    """The rotation and the binding that are left for the next save."""
    rotation = None if done.rotation is not None else wishes.rotation
    binding = None if done.binding is not None else wishes.binding
    if rotation is None and binding is None:
        return NO_WISHES
    return Wishes(rotation=rotation, binding=binding, sign_in=wishes.sign_in)


def _without(values: dict[str, bytes], keys: Collection[str]) -> dict[str, bytes]:
    return {key: raw for key, raw in values.items() if key not in keys}


def _adopt_one_key(
    life: Lifecycle, step: Edit, stored: dict[str, bytes], changes: Mapping[str, Change]
) -> None:
    """Continue after one value was replaced in the store. Changes of other keys stay pending."""
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
    """End the session that the request emptied, in the version that it saw."""
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
