"""Updates tracked values after one key, or a block, was stored or discarded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..values.codec import IMMUTABLE
from ..values.marks import is_marked, split
from .state import Block
from .tracking import NO_KEYS, NOTHING, TrackedValues


def set_stored(values: TrackedValues, key: str, value: Any, raw: bytes) -> None:
    """Note that the store holds ``value`` under ``key`` now."""
    with values.mutex:
        _abandon(values, key)
        values.live[key], values.order = value, None
        if values.given:
            values.given.pop(key, None)
        values.base[key] = raw
        if values.now is not None:
            values.marks[key] = split(raw)[0]


def discard_change(values: TrackedValues, key: str) -> None:
    """Forget that this request changed ``key``."""
    with values.mutex:
        values.base.pop(key, None)
        values.live.pop(key, None)
        if values.given:
            values.given.pop(key, None)
        values.order = None


def drop(values: TrackedValues, key: str) -> None:
    """Note that this request removed ``key`` from the store."""
    with values.mutex:
        _abandon(values, key)
        mark_absent(values, key)


def restart(
    values: TrackedValues, stored: dict[str, bytes], now: Callable[[], int] | None = None
) -> None:
    """Start again with ``stored``, and discard all looks and changes."""
    with values.mutex:
        for key in values.live:
            _abandon(values, key)
        _begin(values, stored, now)


def start_empty(values: TrackedValues) -> None:
    """Start again with no values."""
    with values.mutex:
        _begin(values, {}, None)


def roll_back_values(values: TrackedValues, block: Block) -> list[str]:
    """Discard the changes of ``block``; keep the changes of threads and tasks outside it.

    Returns the keys that both sides changed, whose changes are discarded too.
    """
    with values.mutex:
        # Copies, since another thread may note a look, and encoding may call the application.
        outside = [key for key in list(block.outside) if key in values.base]
        kept = [key for key in outside if key not in block.inside]
        both = [key for key in outside if key in block.inside and _may_have_changed(values, key)]
        live, base, given = values.live, values.base, values.given
        for key in list(live):
            if key not in kept:
                _abandon(values, key, as_it_is=True)
        marks = values.marks if values.now is not None else {}
        _begin(values, values.stored, values.now)
        for key in kept:
            values.base[key] = base[key]
            if key in live:
                values.live[key] = live[key]
            if key in given:
                values.hold(key, given[key])
            if key in marks:
                values.marks[key] = marks[key]
        return both


def changed_when_abandoned(values: TrackedValues) -> list[str]:
    """The keys of objects that were changed after they had left the session."""
    changed: dict[str, None] = {}
    for key, value, raw in values.abandoned or ():
        if value is values.live.get(key):  # it is back
            continue
        try:
            now = values.encode(key, value)
            lost = now != raw and now != split(values.raw(key) or raw)[1]
        except Exception:  # refused, or an error in a method of the object
            lost = True
        if lost:
            changed[key] = None
    return list(changed)


def undecoded(values: TrackedValues, key: str) -> bytes | None:
    """The encoded value of a key that wasn't decoded yet; None for any other key."""
    with values.mutex:
        values.end_looks()
        if key not in values or key in values.live:
            return None
        return values.given.get(key) or values.stored[key]


def replace_lost(values: TrackedValues, key: str, raw: bytes, now: Callable[[], int]) -> None:
    """Use ``raw``, with which another request replaced the lost value of ``key``."""
    with values.mutex:
        values.end_looks()
        mark_absent(values, key)
        del values.base[key]
        if is_marked(raw):
            values.look_for_marks(now)
        values.stored, values.order = {**values.stored, key: raw}, None


def mark_absent(values: TrackedValues, key: str) -> None:
    """Treat ``key``, whose value is lost, as absent, but not as deleted by this request."""
    with values.mutex:
        values.base[key] = None
        values.live.pop(key, None)
        if values.given:
            values.given.pop(key, None)


def _begin(values: TrackedValues, stored: dict[str, bytes], now: Callable[[], int] | None) -> None:
    values.looks = None
    values.live, values.base = {}, {}
    values.given, values.raw_looks = NOTHING, NO_KEYS
    if now is not None:
        values.marks = {}
    values.now, values.stored, values.order = now, stored, None


def _abandon(values: TrackedValues, key: str, *, as_it_is: bool = False) -> None:
    """Note that the object under ``key`` no longer belongs to the session.

    Later changes are detected by comparison with ``base``, or with its present state if
    ``as_it_is``.
    """
    value = values.live.get(key)
    raw = values.base.get(key)
    if type(value) in IMMUTABLE or value is None:
        return
    if as_it_is:
        try:
            raw = values.encode(key, value)
        except Exception:  # refused, or an error in a method of the object
            return
    if raw is not None:
        if values.abandoned is None:
            values.abandoned = []
        values.abandoned.append((key, value, split(raw)[1]))


def _may_have_changed(values: TrackedValues, key: str) -> bool:
    try:
        return values.has_changed(key)
    except Exception:  # refused, or an error in a method of the object
        return True
