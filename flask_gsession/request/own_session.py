"""Rotates at a sign-in, or starts a session of its own for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import RotationRefused
from ..events import logger
from ..values.merge import Change
from .late_changes import report_late
from .lifecycle import CONFIRMED, NO_ATTEMPTS, Lifecycle
from .loading import load
from .rebasing import start_empty
from .state import SAVED, Behind, Seen, Wishes


def rotate_soon(
    life: Lifecycle, grace: float, signed_in: Collection[str] = (), *, confirms: bool = False
) -> None:
    """Rotate with the next save, at the end of a lock, or with a transaction.

    With an old token, a client never gets a new token for the same session: only a sign-in (no
    ``grace``) has an effect then, and it starts a session of its own. ``signed_in``: the keys that
    a library has just set for a user whose identity doesn't depend on this session. ``confirms``:
    whether the user stays the same. If not, a rotation without grace ends earlier confirmations.
    """
    load(life)
    if life.presented().handle is not None:
        raise RotationRefused(
            "A session from ext.open() can't be rotated, and nobody can sign in to it: no "
            "response would carry the new token. Do that in a view."
        )
    if life.phase == SAVED:
        report_late(life, "The token of the session")
        return
    with life.mutex:
        if life.seen.record is None and not life.attempts:
            return
        if life.seen.is_old_token and grace > 0:
            logger.info(
                "Session %s was not rotated: the request holds an old token of it",
                life.handle,
            )
            return
        life.signed_in = signed_in
        earlier = life.wishes.rotation
        life.wish(rotation=grace if earlier is None else min(earlier, grace))
        if grace == 0 and not confirms:
            forget_confirmations(life)
        if life.seen.is_old_token and life.block is None:
            start_own_session(life)


def forget_confirmations(life: Lifecycle) -> None:
    """Drop confirmations from earlier requests, since another user may continue the session."""
    if CONFIRMED in life.values and not life.values.has_changed(CONFIRMED):
        del life.values[CONFIRMED]


def start_own_session(life: Lifecycle) -> None:
    """Continue with a new session for a sign-in, which takes nothing from the old session.

    Either the request came with an old token, or it has just revoked the session of another
    user. The new session keeps the values that this request assigned, so also the sign-in
    itself. A value that was assigned unchanged may come from the old session, so it is dropped,
    unless a library has just signed in with it. The old session stays as it is.
    """
    values = life.values
    changes = values.changes()
    kept = {key: values.raw(key) for key in changes if values.was_assigned(key)}
    kept.update((key, values.raw(key)) for key in life.signed_in if key in values)
    if life.repository.user_keys or (life.seen.body is not None and life.seen.body.joins):
        _keep_for_user(life, changes)
        kept = {key: raw for key, raw in kept.items() if key not in life.repository.user_keys}
    # If no other key is left, and these are removed as well, this is a logout, not a sign-in. After
    # ``clear``, it stays one even if another request has stored a key since.
    left = set(values)
    if life.wishes.cleared:
        left &= {*values.live, *values.given}
    emptied = kept.keys() >= left
    logger.info("A sign-in started a new session, and session %s stays as it is", life.handle)
    binding = life.wishes.binding
    if binding is not None and not binding.user_id:
        binding = None
    start_empty(values)
    life.seen = Seen(presented=True)
    life.wishes = Wishes(cleared=emptied, binding=binding)
    life.entry = None
    life.attempts = NO_ATTEMPTS
    life.lease = None
    for key, raw in kept.items():
        if raw is not None:
            values.set_encoded(key, raw, life.repository.now)


def _keep_for_user(life: Lifecycle, changes: Mapping[str, Change]) -> None:
    """Note the old session's values for the user who signs in. They stay there as well."""
    keys, body, record = life.repository.user_keys, life.seen.body, life.seen.record
    mine = {key: change for key, change in changes.items() if key in keys}
    join, values, ends_at = None, {}, 0
    if body is not None and body.joins and body.owner is None and record is not None:
        join, ends_at = body.joins[0], record.absolute_expires_at
        values = {key: raw for key, raw in life.values.stored.items() if key in join.keys}
    life.behind = Behind(join, values, ends_at, mine)
    life.joined = None  # the old session continues, and may get more values for the user
