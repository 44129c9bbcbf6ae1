"""Lets an anonymous visitor's values join the user's at the sign-in.

The values join first, and then the rotation replaces exactly the version whose values have joined:
see ``tests/simulation/joining.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec.structs import replace

from ..errors import SessionConflict, StoreUnavailable, UnreadableRecord, UserValuesUnreadable
from ..events import logger
from ..repository.user_values import UserValuesRecord
from ..stores.base import Record
from ..users.joins import NotJoined, first_join, login_policy, next_join
from ..values.merge import Change
from ..values.payload import Body, Join
from .lifecycle import Lifecycle
from .loading import load
from .ownership import stored_device_of, user_id_of
from .rebasing import discard_change
from .user_values import values_of

_NOTHING: Collection[str] = ()


def note_join(life: Lifecycle, body: Body, old: Record | None) -> None:
    """Give a session that is about to be stored a join for the user's values, or update it."""
    if life.is_of_user:
        return
    keys = [key for key in life.repository.user_keys if key in body.values]
    body.joins = next_join(body.joins, keys, old)


def join_user(
    life: Lifecycle, body: Body, changes: Mapping[str, Change], old: Record | None
) -> Collection[str]:
    """Let the values for the user join the user's, before a session with a user is stored.

    Returns the keys that leave the session: none if they can't be joined, and a later save tries
    again. Raises ``StoreUnavailable``. Two round trips, none without such values.
    """
    if body.owner is None:
        return _NOTHING
    user_id, stored = body.owner.user_id, life.seen.body
    if life.behind is not None:
        _join_behind(life, user_id)
    join = None if old is None or stored is None else _stored_join(life, stored)
    if join is None:
        return _NOTHING
    if not changes.keys().isdisjoint(join.keys):  # only stored values can join
        return _NOTHING
    return join.keys if _join(life, join, user_id) else _NOTHING


def _stored_join(life: Lifecycle, stored: Body) -> Join | None:
    """The join of the stored session."""
    if stored.joins:
        return stored.joins[0]
    keys = [key for key in life.repository.user_keys if key in stored.values]
    return first_join(life.seen.record, keys) if keys else None


def _join(life: Lifecycle, join: Join, user_id: str) -> bool:
    """Let the session's stored values join the user's. Returns whether they did."""
    if life.joined == (user_id, join):
        return True
    record = life.seen.record
    assert record is not None  # the join is in it
    values = {key: raw for key, raw in life.values.stored.items() if key in join.keys}
    if not _put(life, join, values, record.absolute_expires_at, user_id):
        return False
    life.joined = user_id, join
    return True


def _join_behind(life: Lifecycle, user_id: str) -> None:
    """The same for the session behind an old token, which itself stays as it is."""
    behind = life.behind
    if behind is not None and behind.join is not None:
        _put(life, behind.join, behind.values, behind.ends_at, user_id)
    life.behind = None


def _put(
    life: Lifecycle, join: Join, values: Mapping[str, bytes], ends_at: int, user_id: str
) -> bool:
    try:
        UserValuesRecord(life.repository, user_id).join(join, values, ends_at)
    except (NotJoined, UnreadableRecord) as error:
        logger.warning(
            "Session %s keeps its values: they can't join the user's values (%s)",
            life.handle or "behind an old token",
            error,
        )
        return False
    return True


def close_join(life: Lifecycle) -> None:
    """Note that a sign-in is complete. Two round trips if anything joined."""
    if life.joined is None or life.seen.body is None or life.seen.body.joins:
        return
    user_id, join = life.joined
    if not life.values.stored.keys().isdisjoint(join.keys):  # they joined early
        return
    life.joined = None
    try:
        UserValuesRecord(life.repository, user_id).close_join(join.id)
    except (StoreUnavailable, SessionConflict, UnreadableRecord) as error:
        logger.warning("A user's values keep a note of a sign-in longer than needed: %s", error)


def signs_in(life: Lifecycle) -> str | None:
    """The user to whom the next save binds the session, unless it is theirs already."""
    user_id = user_id_of(life)
    return None if user_id is None or stored_device_of(life, user_id) else user_id


def join_early(life: Lifecycle, user_id: str) -> None:
    """Called when a request looks at a user's values before the sign-in is stored.

    The visitor's values join first, so that it finds them. Two round trips, none without such
    values; the sign-in then costs two less.
    """
    with life.mutex:
        join = None if life.seen.body is None else _stored_join(life, life.seen.body)
        if join is not None:
            _join(life, join, user_id)
        hand_over(life, user_id)
        _join_behind(life, user_id)


def hand_over(life: Lifecycle, user_id: str) -> bool:
    """Move changes for the user to the user's values, before a sign-in is stored.

    This request made them before the sign-in. They are stored with the user's values. Returns
    whether there were any. One round trip if so.
    """
    keys = life.repository.user_keys
    changes = {key: each for key, each in life.changes().items() if key in keys} if keys else {}
    if life.behind is not None:
        changes = {**life.behind.changes, **changes}
    if not changes:
        return False
    user = values_of(life, user_id)
    values, repository = load(user), life.repository
    try:
        user.check_readable()
        theirs = {key: raw for key in changes if (raw := values.raw(key)) is not None}
        base = {key: each.base for key, each in changes.items() if each.base is not None}
        mine = {key: each.mine for key, each in changes.items() if each.mine is not None}
        after = user.user_values.combine(theirs, base, mine)
    except (NotJoined, UserValuesUnreadable):
        return False
    policies = {key: login_policy(key, keys[key], repository.merger) for key in changes}
    user.merge_by(policies)
    for key in changes:
        if after.get(key) != theirs.get(key):
            if key in after:
                values.set_encoded(key, after[key], repository.now)
            else:
                del values[key]
        discard_change(life.values, key)
    if life.behind is not None:
        life.behind = replace(life.behind, changes={})
    return True
