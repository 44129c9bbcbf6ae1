"""Three-way merge of session changes, key by key, and the ready-made policies.

``base`` is what this request saw, ``theirs`` what is stored now, ``mine`` what this request wants.
A key that nobody else changed takes mine. Where both changed it, the key's policy decides.
A key that this request deletes is deleted, whatever the policy, except with ``"reject"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from msgspec import Raw
from werkzeug.exceptions import HTTPException

from .codec import Codec
from .errors import GSessionError, SessionConflict, ValueRefused


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"

    def __bool__(self) -> bool:
        return False


#: Stands for "no such key" in what a merge function receives as ``base`` or ``theirs``.
MISSING: Final = _Missing()

MergeFunction = Callable[[Any, Any, Any], Any]


def last(base: Any, theirs: Any, mine: Any) -> Any:
    """The later write wins: mine."""
    return mine


def reject(base: Any, theirs: Any, mine: Any) -> Any:
    """Refuse: raises ``SessionConflict``."""
    raise SessionConflict


def counter(base: Any, theirs: Any, mine: Any) -> Any:
    """Numbers: both changes count. A missing number is 0."""
    return (theirs or 0) + (mine - (base or 0))


def set_union(base: Any, theirs: Any, mine: Any) -> Any:
    """Sets: what either added is in, what this request removed is out."""
    before = frozenset(base or ())
    return type(mine)((frozenset(theirs or ()) - (before - mine)) | (mine - before))


def dict_by_key(base: Any, theirs: Any, mine: Any) -> Any:
    """Dicts: merged entry by entry; of two changes to one entry the later wins."""
    before = base or {}
    merged = dict(theirs or {})
    for key in before:
        if key not in mine:
            merged.pop(key, None)
    for key, value in mine.items():
        if key not in before or before[key] != value or type(before[key]) is not type(value):
            merged[key] = value
    return merged


def append(base: Any, theirs: Any, mine: Any) -> Any:
    """Lists that only grow: both additions stay, theirs first.

    Raises ``SessionConflict`` where this request did more than append.
    """
    before = base or []
    if mine[: len(before)] != before:
        raise SessionConflict
    return (theirs or []) + mine[len(before) :]


#: The policies that settings name by a word.
POLICIES: dict[str, MergeFunction] = {
    "last": last,
    "reject": reject,
    "counter": counter,
    "set": set_union,
    "dict": dict_by_key,
    "append": append,
}


class Change(NamedTuple):
    """One changed key, in encoded form; None where there is or shall be no value."""

    base: Raw | None
    mine: Raw | None


class Merger:
    """Puts a request's changes onto what is stored."""

    def __init__(
        self, codec: Codec, default: MergeFunction, policies: Mapping[str, MergeFunction]
    ) -> None:
        self._codec = codec
        self._default = default
        self._policies = policies

    def apply(self, stored: Mapping[str, Raw], changes: Mapping[str, Change]) -> dict[str, Raw]:
        """The encoded values after the changes.

        Raises ``SessionConflict`` where a policy refuses, ``ValueRefused`` where one fails.
        """
        merged = dict(stored)
        for key, (base, mine) in changes.items():
            theirs = stored.get(key)
            if theirs != base:
                mine = self._resolve(key, base, theirs, mine)
            if mine is None:
                merged.pop(key, None)
            else:
                merged[key] = mine
        return merged

    def _resolve(
        self, key: str, base: Raw | None, theirs: Raw | None, mine: Raw | None
    ) -> Raw | None:
        policy = self._policies.get(key, self._default)
        if policy is last or (mine is None and policy is not reject):
            return mine
        values = (
            MISSING if raw is None else self._codec.decode(raw) for raw in (base, theirs, mine)
        )
        try:
            result = policy(*values)
        except (GSessionError, HTTPException):
            raise
        except Exception as error:
            raise ValueRefused(
                f"session[{ascii(key)[:60]}]",
                f"its merge policy {getattr(policy, '__name__', policy)} failed with "
                f"{type(error).__name__}: the values are not of the kind it merges",
            ) from error
        return self._codec.encode(key, result)
