"""Follows other requests: loads what they stored, and settles writes of unknown outcome."""

from __future__ import annotations

from msgspec.structs import replace

from ..errors import Gone, KeyTaken, Stale, StoreUnavailable, UnreadableRecord
from ..repository.repository import Loaded
from ..stores.base import Record
from ..values.merge import last
from .lifecycle import NO_ATTEMPTS, Lifecycle
from .rebasing import restart
from .state import Attempt, Seen, Wishes, remaining, without_rotation
from .tracking import NO_CHANGES


def catch_up(life: Lifecycle, *, discard: bool = False) -> bool:
    """Load what other requests stored; False if the session has ended.

    Values that this request looked at or changed stay as they are; with ``discard``, they are
    dropped. Finds out whether this request's own writes with unknown outcome were stored. Raises
    ``SessionConflict`` if that is impossible, and repeating such a write would do harm. One round
    trip.
    """
    seen = life.seen
    if seen.record is None:
        return life.find_new(discard=discard)
    key = seen.record.key
    try:
        loaded = life.repository.find(key)
        if loaded is None and life.attempts:
            loaded = _find_rotated(life, seen.record)
    except UnreadableRecord as error:
        life.seen = Seen(record=seen.record, for_others=error.for_others)
        life.repository.refusals.note(error.reason, key, error.detail)
        return False
    except StoreUnavailable as error:
        life.note_outage(error, "loaded again")
        raise
    if loaded is None:
        return False
    record, body = loaded.record, loaded.body
    token = seen.token if record.key == key else None
    wishes = life.wishes
    own = settle_attempts(life, record, seen.record, repeats=not discard)
    if own is not None:
        life.values.rebase(own.body.values, saved=own.changes)
        wishes = remaining(own.wishes, wishes)
        life.entry = own.entry
        if own.token is not None:
            token = own.token
            life.cookie = "set"
    elif token is None and seen.token is not None:
        # Another request rotated the session, and gives the client its token.
        life.cookie = "keep"
        if wishes.rotation != 0:
            wishes = without_rotation(wishes)
    now = life.repository.now if body.marked else None
    if discard:
        restart(life.values, body.values, now)
        wishes = Wishes(rotation=wishes.rotation, binding=wishes.binding, sign_in=wishes.sign_in)
    else:
        life.values.rebase(body.values, now)
    if life.written_large is not None:
        life.written_large.mark_referenced(body.values)
    life.wishes = wishes
    life.seen = Seen(token, record, body, presented=seen.presented)
    if record.version != seen.record.version:
        life.attempts = NO_ATTEMPTS  # last, since an exception may interrupt before
    return True


def _find_rotated(life: Lifecycle, before: Record) -> Loaded | None:
    """The session that one of the attempts moved from ``before`` to another key.

    Where a rotation takes two steps, only the first may have been done before somebody logged out.
    So this repeats the rotation, only to learn whether it was stored.
    """
    for attempt in life.attempts.values():
        grace, record = attempt.wishes.rotation, attempt.record
        if record.key == before.key or grace is None:
            continue
        loaded = life.repository.find(record.key)
        if loaded is not None and loaded.record.version == record.version:
            try:
                life.repository.rotate(before, record, attempt.body, grace, shorten=True)
            except (Gone, Stale, KeyTaken):
                continue
        if loaded is not None:  # another request has reached and changed the session
            return loaded
    return None


def settle_attempts(
    life: Lifecycle, there: Record, before: Record, *, repeats: bool
) -> Attempt | None:
    """Return the attempt that was stored, as the stored record ``there`` proves.

    While the version of ``before`` is still stored, any attempt may still arrive. Otherwise, forget
    the attempts after adopting ``there``. ``repeats``: whether pending changes will be stored
    again, even if an attempt has stored them.
    """
    if there.version == before.version:
        if not repeats:  # a late attempt stores changes that this request has discarded
            life.attempts = {
                version: replace(attempt, changes=NO_CHANGES)
                for version, attempt in life.attempts.items()
            }
        return None
    own = life.attempts.get(there.version)
    for attempt in life.attempts.values():
        # Only this attempt creates that key, so it was stored, whatever others have done since.
        if attempt.record.key == there.key != before.key:
            own = attempt
    if own is None and repeats:
        # Another writer's version, stored after an attempt or instead of it. If an attempt can't be
        # repeated safely, all stay noted, so that no later call takes them for settled.
        policy_of = life.repository.merger.policy_of
        for other in life.attempts.values():
            for key in other.changes:
                if policy_of(key, life.policies) is not last and life.values.has_changed(key):
                    raise life.conflict("unknown outcome")
    return own


def resolve_attempts(life: Lifecycle) -> None:
    """Find out whether interrupted writes were stored. No round trip if there were none."""
    if not life.attempts or life.ended:
        return
    if life.seen.record is not None or life.is_of_user:
        if not catch_up(life):
            life.end("save")
        return
    for attempt in life.attempts.values():
        try:
            loaded = life.repository.find(attempt.record.key)
        except UnreadableRecord:
            continue
        except StoreUnavailable as error:
            life.note_outage(error, "loaded again")
            raise
        if loaded is None:
            continue  # it may still arrive, as a session whose token no client gets
        life.values.rebase(attempt.body.values, saved=attempt.changes)
        life.values.rebase(loaded.body.values)
        life.wishes = remaining(attempt.wishes, life.wishes)
        life.entry = attempt.entry
        life.cookie = "set"
        if life.written_large is not None:
            life.written_large.mark_referenced(loaded.body.values)
        life.seen = Seen(attempt.token, loaded.record, loaded.body)
        life.attempts = NO_ATTEMPTS  # last, since an exception may interrupt before
        return
