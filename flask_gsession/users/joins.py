"""How a visitor's values are merged into a user's at sign-in. No function here stores anything.

``tests/simulation/joining.py`` explores the protocol around it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Protocol

from ..errors import SessionConflict, SessionTooLarge, UnreadableRecord, ValueLost, ValueRefused
from ..stores.base import Record
from ..values.codec import Codec
from ..values.marks import expired, marked, split
from ..values.merge import DECLARED, MISSING, Change, MergeFunction, Merger, last, same
from ..values.payload import CLOSED, Body, Join
from ..values.references import holds, reference_in, refers

#: The ways to treat a visitor's value at the sign-in; see ``SessionKey``.
AT_LOGIN: Final = ("merge", "keep", "replace", "discard")
_ID_BYTES = 9
_MOST_JOINS = 1000  # for each user; beyond that, the oldest closed joins are dropped
HOUR = 3_600_000  # milliseconds; longer than any request takes

_FAILURES = (SessionConflict, UnreadableRecord, ValueLost, ValueRefused, SessionTooLarge)


class UserKey(Protocol):
    """A key with ``scope="user"``: ``typed.SessionKey``."""

    at_login: str

    def merge_function(self, of_settings: MergeFunction | None) -> MergeFunction | None:
        """The key's merge policy, if it has one."""

    def checked(self, merge: MergeFunction) -> MergeFunction:
        """The same policy, with its results checked by the key."""


#: Merges encoded values: the user's, the visitor's at the last join, and the visitor's now.
Combine = Callable[
    [Mapping[str, bytes], Mapping[str, bytes], Mapping[str, bytes]], dict[str, bytes]
]


class NotJoined(Exception):
    """The values can't be joined now: they stay in the session."""


def first_join(old: Record | None, keys: Collection[str]) -> Join:
    """The join of a session that has values for a user under ``keys``, but no join yet.

    This happens if the key was declared after they were stored. The id is derived from the stored
    version, so all requests that start from that version get the same id.
    """
    if old is None:
        return Join(secrets.token_bytes(_ID_BYTES), 0, keys=tuple(keys))
    digest = hashlib.sha256(b"flask-gsession join %d " % old.version + old.key.encode()).digest()
    return Join(digest[:_ID_BYTES], 0, keys=tuple(keys))


def next_join(
    joins: tuple[Join, ...], keys: Collection[str], old: Record | None = None
) -> tuple[Join, ...]:
    """The join for the next version of a session, which has values for a user under ``keys``.

    ``old``: the version that it replaces, if any.
    """
    if not joins and not keys:
        return ()
    join = joins[0] if joins else first_join(old, keys)
    known = (*join.keys, *(key for key in keys if key not in join.keys))
    return (Join(join.id, join.revision + 1, keys=known),)


def merge_joins(one: tuple[Join, ...], other: tuple[Join, ...]) -> tuple[Join, ...]:
    """The join of a session that was changed in two places, later than both."""
    if not one or not other:
        return one or other
    known = [key for key in other[0].keys if key not in one[0].keys]
    latest = max(one[0].revision, other[0].revision) + 1
    return (Join(one[0].id, latest, keys=(*one[0].keys, *known)),)


def joined(
    body: Body,
    join: Join,
    mine: Mapping[str, bytes],
    absolute_end: int,
    combine: Combine,
    now: int,
) -> Body | None:
    """The user's record with the values ``mine`` of a session; None if they had joined before.

    ``join``: the session's. ``absolute_end``: when that session ends at the latest, in
    milliseconds. ``combine``: see ``combined``, which raises ``NotJoined``.
    """
    before = next((each for each in body.joins if each.id == join.id), None)
    if before is not None and before.revision >= join.revision:
        return None
    base = {} if before is None else before.values
    values = combine(body.values, base, mine)
    there = Join(join.id, join.revision, dict(mine), absolute_end + HOUR)
    joins = (*(each for each in body.joins if each.id != join.id), there)
    return with_joins(body, values, joins, now)


def closed(body: Body, join_id: bytes, now: int) -> Body | None:
    """The user's record after a complete sign-in; None if there is nothing to close."""
    there = next((each for each in body.joins if each.id == join_id), None)
    if there is None or there.revision == CLOSED:
        return None
    joins = tuple(
        Join(each.id, CLOSED, {}, each.ends_at) if each is there else each for each in body.joins
    )
    return with_joins(body, body.values, joins, now)


def with_joins(body: Body, values: dict[str, bytes], joins: tuple[Join, ...], now: int) -> Body:
    return Body(
        values,
        body.lifetime,
        body.marked,
        has_large=body.has_large,
        joins=lasting(joins, now),
    )


def lasting(joins: tuple[Join, ...], now: int) -> tuple[Join, ...]:
    """The joins that are still needed, since their anonymous sessions may be alive."""
    left = tuple(each for each in joins if each.ends_at > now)
    if len(left) > _MOST_JOINS:
        finished = [each for each in left if each.revision == CLOSED]
        dropped = sorted(finished, key=lambda each: each.ends_at)[: len(left) - _MOST_JOINS]
        left = tuple(each for each in left if each not in dropped)
    return left


def combined(
    theirs: Mapping[str, bytes],
    base: Mapping[str, bytes],
    mine: Mapping[str, bytes],
    merger: Merger,
    codec: Codec,
    keys: Mapping[str, UserKey],
    now: int,
) -> dict[str, bytes]:
    """The user's encoded values with the changes from ``base`` to ``mine``.

    ``keys``: the application's keys, as far as it has used them. Raises ``NotJoined`` if a policy
    or a schema refuses.
    """
    found = dict(theirs)
    for name in (*mine, *(name for name in base if name not in mine)):
        key = keys.get(name) or _declared(name)
        at_login = "keep" if key is None else key.at_login
        there, was, wanted = found.get(name), base.get(name), mine.get(name)
        if expired(there, now):
            there = None
        unchanged = wanted == was or holds(was, wanted)
        if at_login == "discard" or unchanged or expired(wanted, now):
            continue
        policies: dict[str, MergeFunction] = {}
        if there is not None and not _same(there, was):
            if at_login == "keep":
                continue
            policies[name] = login_policy(name, key, merger)
            if wanted is None:
                wanted = _emptied(codec, name, was)
                if wanted is None:
                    continue
        try:
            after = merger.apply(found, {name: Change(was, wanted)}, now, policies)
        except _FAILURES as error:
            if name not in mine:
                continue  # the visitor's value was removed; the user's stays as it is
            raise NotJoined(_reason(name, error)) from error
        found = after
    return found


def _reason(name: str, error: Exception) -> str:
    """For the log, without values."""
    if not isinstance(error, SessionConflict):
        return str(error)
    cause = error.__cause__
    why = f": {cause}" if type(cause) is ValueError else ""
    return f"the merge policy or the schema of {ascii(name)[:60]} refuses{why}"


def _declared(name: str) -> UserKey | None:
    """The key of that name. Raises ``NotJoined`` if there are several.

    In that case they belong to several applications, and this one has not used its key yet.
    """
    known = [key for key in DECLARED.get(name, ()) if key.scope == "user"]
    if len(known) > 1:
        raise NotJoined(f"several keys are named {ascii(name)[:60]}")
    return known[0] if known else None


def _same(one: bytes, other: bytes | None) -> bool:
    """Whether two encoded values are equal, even if large ones are stored under two names."""
    if one == other:
        return True
    if other is None or not refers(one) or not refers(other) or split(one)[0] != split(other)[0]:
        return False
    mine, theirs = reference_in(one), reference_in(other)
    return (mine.kind, mine.digest, mine.length) == (theirs.kind, theirs.digest, theirs.length)


def login_policy(name: str, key: UserKey | None, merger: Merger) -> MergeFunction:
    """The policy that merges the visitor's value with the user's."""
    if key is not None and key.at_login == "replace":
        return last
    of_settings = merger.policies.get(name)
    policy = of_settings if key is None else key.merge_function(of_settings)
    if policy is not None:
        return policy
    return entry_by_entry if key is None else key.checked(entry_by_entry)


def _emptied(codec: Codec, name: str, was: bytes | None) -> bytes | None:
    """An empty collection of the same type, to merge the removal of one; None for other values."""
    if was is None:
        return None
    try:
        kind = type(codec.decode(split(was)[1]))
    except (UnreadableRecord, ValueLost):
        return None
    if kind not in (dict, list, set, frozenset):
        return None
    return marked(codec.encode(name, kind()), split(was)[0])


def entry_by_entry(base: Any, theirs: Any, mine: Any) -> Any:
    """Merge dicts, lists and sets at every depth: the user's entries plus the visitor's new ones.

    Of other values, the visitor's wins if it changed since the last join.
    """
    kind: Any = type(mine)
    if base is not MISSING and same(base, mine):
        return theirs
    if type(theirs) is not kind or kind not in (dict, list, set, frozenset):
        return mine
    before: Any = base if type(base) is kind else kind()
    if kind is dict:
        kept = {key: item for key, item in theirs.items() if key in mine or key not in before}
        for key, item in mine.items():
            if key in kept:
                kept[key] = entry_by_entry(before.get(key, MISSING), kept[key], item)
            elif key not in before or not same(before[key], item):
                kept[key] = item
        return kept
    if kind is list:
        there = [item for item in theirs if item in mine or item not in before]
        return there + [item for item in mine if item not in before and item not in there]
    return (theirs - (before - mine)) | (mine - before)
