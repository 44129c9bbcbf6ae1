"""Three-way merge of session changes, key by key, and the ready-made policies.

``base`` is the value that this request saw, ``theirs`` the value that is stored now, ``mine`` the
value that this request wants. If nobody else changed the key, mine is stored. If both changed it,
the key's policy decides. If this request deletes the key, it is deleted, except with ``"reject"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple, Protocol

from werkzeug.exceptions import HTTPException

from ..errors import GSessionError, SessionConflict, SessionTooLarge, ValueLost, ValueRefused
from ..weak import WeakObjects
from .codec import Codec
from .marks import PLAIN, Mark, expired, marked, split, unexpired
from .references import content_of, length_of


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"

    def __bool__(self) -> bool:
        return False


#: Passed to a merge function as ``base`` or ``theirs`` if there is no such key.
MISSING: Final = _Missing()

_ANY_DEPTH = Codec(max_depth=256)

MergeFunction = Callable[[Any, Any, Any], Any]


def last(base: Any, theirs: Any, mine: Any) -> Any:
    """The later write wins: mine."""
    return mine


def reject(base: Any, theirs: Any, mine: Any) -> Any:
    """Refuse: raises ``SessionConflict``."""
    raise SessionConflict


def counter(base: Any, theirs: Any, mine: Any) -> Any:
    """Numbers: both changes count. A missing number is 0."""
    before, stored, wanted = _all_of((int, float, Decimal), 0, base, theirs, mine)
    return stored + (wanted - before)


def set_union(base: Any, theirs: Any, mine: Any) -> Any:
    """Sets: adds and removes the same entries as this request, and keeps the other changes."""
    before, stored, wanted = _all_of((set, frozenset), frozenset(), base, theirs, mine)
    return type(mine)((stored - (before - wanted)) | (wanted - before))


def dict_by_key(base: Any, theirs: Any, mine: Any) -> Any:
    """Dicts: merged entry by entry. If both changed one entry, the later change wins."""
    before, stored, wanted = _all_of((dict,), {}, base, theirs, mine)
    merged = {key: value for key, value in stored.items() if key in wanted or key not in before}
    for key, value in wanted.items():
        if key not in before or not same(before[key], value):
            merged[key] = value
    return merged


def append(base: Any, theirs: Any, mine: Any) -> Any:
    """Lists that only grow: keeps both additions, theirs first.

    Raises ``SessionConflict`` if this request did more than append.
    """
    before, stored, wanted = _all_of((list,), [], base, theirs, mine)
    if not same(wanted[: len(before)], before):
        raise SessionConflict
    return stored + wanted[len(before) :]


def flashes(base: Any, theirs: Any, mine: Any) -> Any:
    """Flashed messages: keeps both requests' messages, except the ones that either has shown."""
    before, stored, wanted = _all_of((list,), [], base, theirs, mine)
    shown_by_them = not same(stored[: len(before)], before)
    if same(wanted[: len(before)], before):
        return stored + wanted[len(before) :]
    return (stored if shown_by_them else stored[len(before) :]) + wanted


def _all_of(kinds: tuple[type, ...], missing: Any, *values: Any) -> tuple[Any, ...]:
    """The values, with ``missing`` for ``MISSING``. Raises ``TypeError`` for other types."""
    for value in values:
        if value is not MISSING and type(value) not in kinds:
            raise TypeError(f"{type(value).__name__} isn't one of {[k.__name__ for k in kinds]}")
    return tuple(missing if value is MISSING else value for value in values)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, with equal types at every depth."""
    return _ANY_DEPTH.encode("", one) == _ANY_DEPTH.encode("", other)


#: The policies by their names in settings.
POLICIES: dict[str, MergeFunction] = {
    "last": last,
    "reject": reject,
    "counter": counter,
    "set": set_union,
    "dict": dict_by_key,
    "append": append,
}


def encode_within(codec: Codec, key: str, value: object, *known: bytes | None) -> bytes:
    """Encode a value that replaces one of the ``known`` values.

    A value that is nested too deep passes if it is no longer than the longest of them, since the
    limit may have been lowered after they were stored. Raises as ``Codec.encode`` does.
    """
    try:
        return codec.encode(key, value)
    except SessionTooLarge:
        longest = max(map(length_of, known))
        if longest:
            raw = codec.encode_deeper(key, value)
            if len(content_of(raw)[1]) <= longest:
                return raw
        raise


#: Policies that also decide if this request removes the key.
_SEE_REMOVALS = (reject, flashes)


class Change(NamedTuple):
    """The encoded values of a changed key before and after; None stands for no value."""

    base: bytes | None
    mine: bytes | None

    def __repr__(self) -> str:
        sizes = (None if raw is None else f"{len(raw)} bytes" for raw in self)
        return f"<Change: {' to '.join(map(str, sizes))}>"


class Versioned(Protocol):
    """A typed key: the attribute ``key`` of its merge policies."""

    version: int
    scope: str

    def merge_function(self, of_settings: MergeFunction | None) -> MergeFunction | None:
        """The key's merge policy, or else the one from the settings with its result checked."""

    def upgraded(self, version: int, data: Any) -> Any:
        """Stored data, upgraded to the key's version. Raises ``SessionConflict`` if it can't be."""


#: The typed keys of this process by name. An application may not have used its key yet.
DECLARED: dict[str, WeakObjects[Any]] = {}


class Merger:
    """Merges a request's changes into the stored values."""

    def __init__(
        self, codec: Codec, default: MergeFunction, policies: Mapping[str, MergeFunction]
    ) -> None:
        self._codec = codec
        self._default = default
        self.policies = {"_flashes": flashes, **policies}

    def apply(
        self,
        stored: Mapping[str, bytes],
        changes: Mapping[str, Change],
        now: int | None = None,
        policies: Mapping[str, MergeFunction] | None = None,
    ) -> dict[str, bytes]:
        """The encoded values after the changes; ``policies`` override the settings.

        With ``now`` (milliseconds), values that have expired by then count as missing on all three
        sides. So an expired value is dropped, a change to it has no effect, and a value that
        another request stored instead stays.

        Raises ``SessionConflict`` if a policy refuses, and ``ValueRefused`` if it fails.
        """
        if now is not None:
            stored = unexpired(stored, now)
            changes = _unexpired_changes(changes, now)
        merged = dict(stored)
        for key, (base, mine) in changes.items():
            theirs = stored.get(key)
            if theirs != base:
                mine = self._resolve(self.policy_of(key, policies), key, base, theirs, mine)
            if mine is None:
                merged.pop(key, None)
            else:
                merged[key] = mine
        return merged

    def policy_of(
        self, key: str, policies: Mapping[str, MergeFunction] | None = None
    ) -> MergeFunction:
        """The policy of a key; ``policies`` override those in the settings."""
        if policies is not None and key in policies:
            return policies[key]
        return self.policies.get(key, self._default)

    def _resolve(
        self,
        policy: MergeFunction,
        key: str,
        base: bytes | None,
        theirs: bytes | None,
        mine: bytes | None,
    ) -> bytes | None:
        if policy is last or (mine is None and policy not in _SEE_REMOVALS):
            return mine
        values, marks = [], []
        for raw in (base, theirs, mine):
            mark, plain = (PLAIN, None) if raw is None else split(raw)
            try:
                values.append(MISSING if plain is None else self._codec.decode(plain))
            except ValueLost:
                if raw is not theirs:
                    raise SessionConflict from None
                values.append(MISSING)
            marks.append(mark)
        key_of_policy: Versioned | None = getattr(policy, "key", None)
        if key_of_policy is not None:
            values = _upgraded(key_of_policy, values, marks)
        try:
            result = policy(*values)
        except (GSessionError, HTTPException):
            raise
        except Exception as error:
            raise ValueRefused(
                f"session[{ascii(key)[:60]}]",
                f"its merge policy {getattr(policy, '__name__', policy)} failed with "
                f"{type(error).__name__}; make sure that it can merge values of these types",
            ) from error
        if policy is flashes and not result:
            return None
        # Merge the mark too: mine if this request changed it, or has the only value.
        was, stored, wanted = marks
        mark = stored if theirs is not None and wanted == was else wanted
        if key_of_policy is not None:
            mark = mark._replace(version=key_of_policy.version)
        return marked(encode_within(self._codec, key, result, base, theirs, mine), mark)


def _upgraded(key: Versioned, values: list[Any], marks: list[Mark]) -> list[Any]:
    """The three sides, upgraded to the key's version, since workers may have stored older ones."""
    found = []
    for number, (value, mark) in enumerate(zip(values, marks, strict=True)):
        if value is not MISSING and mark.version != key.version:
            try:
                value = key.upgraded(mark.version, value)
            except SessionConflict:
                if number:
                    raise
                value = MISSING  # the base, of which this request saw the default instead
        found.append(value)
    return found


def _unexpired_changes(changes: Mapping[str, Change], now: int) -> dict[str, Change]:
    found = {}
    for key, sides in changes.items():
        base, mine = (None if expired(raw, now) else raw for raw in sides)
        if base != mine:
            found[key] = Change(base, mine)
    return found
