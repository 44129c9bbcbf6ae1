"""Merge policies of typed keys. The schema checks their results.

An invalid result raises ``SessionConflict`` in the request that came later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from marshmallow import ValidationError

from ..errors import SessionConflict
from ..values.merge import (
    MISSING,
    POLICIES,
    MergeFunction,
    Versioned,
    last,
    reject,
    set_union,
)
from .schemas import Form
from .stored import from_stored, to_stored

Run = Callable[[Callable[[Any], Any], Any], Any]


def merge_of_values(form: Form, merge: MergeFunction, run: Run, key: Versioned) -> MergeFunction:
    """Turn a function of loaded values into a policy for stored values."""

    def merged(base: Any, theirs: Any, mine: Any) -> Any:
        try:
            base = _read(form, base, run)
        except ValidationError:  # this request saw the default instead
            base = MISSING
        try:
            result = merge(base, _read(form, theirs, run), _read(form, mine, run))
            return run(lambda value: form.accept(value, handed_out=True), result)[1]
        except ValidationError as error:
            raise SessionConflict from error

    return _as_policy(merge, merged, key)


def merge_of_stored(form: Form, merge: MergeFunction, run: Run, key: Versioned) -> MergeFunction:
    """Turn a function of dumped values into a policy for stored values."""
    if merge is last or merge is reject:
        return merge

    def merged(base: Any, theirs: Any, mine: Any) -> Any:
        sides = [side if side is MISSING else from_stored(side) for side in (base, theirs, mine)]
        if merge is set_union and list in map(type, sides):
            result = _list_union(*sides)
        else:
            result = merge(*sides)
        stored = to_stored(form.name, result)
        try:
            run(form.read, stored)
        except ValidationError as error:
            raise SessionConflict from error
        return stored

    return _as_policy(merge, merged, key)


def policy_of(name: str | MergeFunction, form: Form, run: Run, key: Versioned) -> MergeFunction:
    """The checked policy for the name of a policy, or for a function."""
    if isinstance(name, str):
        return merge_of_stored(form, POLICIES[name], run, key)
    return merge_of_values(form, name, run, key)


def _as_policy(merge: MergeFunction, merged: MergeFunction, key: Versioned) -> MergeFunction:
    policy: Any = merged
    policy.__name__ = getattr(merge, "__name__", repr(merge))  # for messages
    policy.key = key  # upgrades the values before they are merged
    return merged


def _read(form: Form, side: Any, run: Run) -> Any:
    return side if side is MISSING else run(form.read, side)


def _list_union(base: Any, theirs: Any, mine: Any) -> list[Any]:
    """``set_union`` for lists, since schemas dump sets as lists. New items come last."""
    before, stored, wanted = ([] if side is MISSING else side for side in (base, theirs, mine))
    kept = [item for item in stored if item in wanted or item not in before]
    return kept + [item for item in wanted if item not in before and item not in kept]
