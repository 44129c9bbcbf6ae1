"""Deep comparison of values and of their stored forms."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from enum import Enum
from typing import Any

from ..values.codec import IMMUTABLE

_NOTHING: Any = object()

Path = tuple[Any, ...]


def covers(made: Any, data: Any) -> bool:
    """Whether ``made`` holds all of ``data``, with equal values of the same types at every depth.

    Dicts in ``made`` may have more keys.
    """
    if type(data) is not type(made):
        return False
    if type(data) is dict:
        for key, item in data.items():
            other = made.get(key, _NOTHING)
            if type(item) in (str, int, bool):  # the usual case, without a call
                if type(other) is not type(item) or other != item:
                    return False
            elif not covers(other, item):
                return False
        return True
    if type(data) in (list, tuple):
        return len(data) == len(made) and all(map(covers, made, data))
    return bool(data == made)


def common(made: Any, data: Any) -> Any:
    """``data``, with only those keys of dicts that ``made`` has in the same place."""
    if type(data) is dict and type(made) is dict:
        return {key: common(made[key], item) for key, item in data.items() if key in made}
    if type(data) is type(made) and type(data) in (list, tuple) and len(data) == len(made):
        return type(data)(map(common, made, data))
    return data


def drops_keys(made: Any, data: Any) -> bool:
    """Whether a mapping in ``data`` has a key that ``made`` lacks in the same place."""
    if isinstance(data, Mapping) and isinstance(made, Mapping):
        return any(key not in made or drops_keys(made[key], item) for key, item in data.items())
    if isinstance(data, (list, tuple)) and isinstance(made, (list, tuple)):
        return any(map(drops_keys, made, data))
    return False


def difference(wanted: Any, got: Any) -> Path | None:
    """The path to the first difference between the two, or None.

    Dicts in ``got`` may have more keys. Objects are equal by ``==``, or if all of their attributes
    are equal. NaN equals nothing.
    """
    return _difference(wanted, got, set())


def _difference(wanted: Any, got: Any, inside: set[int]) -> Path | None:
    if isinstance(wanted, Mapping) and isinstance(got, Mapping):
        for key, item in wanted.items():
            if key not in got:
                return (key,)
            found = _difference(item, got[key], inside)
            if found is not None:
                return (key, *found)
        return None
    if isinstance(wanted, (list, tuple)) and (
        isinstance(got, type(wanted)) or isinstance(wanted, type(got))
    ):
        if len(wanted) != len(got):
            return ()
        for index, (item, other) in enumerate(zip(wanted, got, strict=True)):
            found = _difference(item, other, inside)
            if found is not None:
                return (index, *found)
        return None
    if not _related(wanted, got):
        return ()
    if isinstance(wanted, (dt.datetime, dt.time)):
        same = _equal(wanted, got) and wanted.utcoffset() == got.utcoffset()
        return None if same else ()
    if _equal(wanted, got):
        return None
    if type(wanted) in IMMUTABLE or isinstance(wanted, Enum):
        return ()
    return _difference_of_objects(wanted, got, inside)


def _difference_of_objects(wanted: Any, got: Any, inside: set[int]) -> Path | None:
    one, other = _attributes(wanted), _attributes(got)
    if one is None or other is None:
        return ()
    if id(wanted) in inside:  # it contains itself
        return None
    found = _difference(one, other, inside | {id(wanted)})
    if found is None and one.keys() != other.keys():
        return ()
    return found


def _related(wanted: Any, got: Any) -> bool:
    """Whether these types count as the same: int and float, or a subclass and its plain base."""
    one, other = type(wanted), type(got)
    if one is other:
        return True
    if bool in (one, other):
        return False
    if one is int and other is float:
        return True
    return (other in IMMUTABLE and issubclass(one, other)) or (
        one in IMMUTABLE and issubclass(other, one)
    )


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # a type that can't be compared
        return False


def _attributes(value: Any) -> dict[str, Any] | None:
    """All attributes of an object of a user-defined class; None for other objects."""
    if isinstance(value, (str, bytes, int, float, set, frozenset)):
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.compare]
        return {name: getattr(value, name, _NOTHING) for name in names}
    slots = [
        name
        for kind in type(value).__mro__
        for name in _names(vars(kind).get("__slots__", ()))
        if name not in ("__dict__", "__weakref__") and hasattr(value, name)
    ]
    if not slots and not hasattr(value, "__dict__"):
        return None
    return {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}


def _names(slots: Any) -> Any:
    return (slots,) if isinstance(slots, str) else slots


def without(data: Any, messages: Any) -> Any:
    """``data`` without the fields that the messages of a ``ValidationError`` name."""
    if isinstance(data, Mapping) and isinstance(messages, dict):
        return {
            key: without(item, messages.get(key))
            for key, item in data.items()
            if key not in messages or (isinstance(messages[key], dict) and _holds_more(item))
        }
    if isinstance(data, list) and isinstance(messages, dict):
        return [without(item, messages.get(index)) for index, item in enumerate(data)]
    return data


def _holds_more(item: Any) -> bool:
    return isinstance(item, (Mapping, list))
