"""Converts a schema's dump to values that a session can store, and back.

A session can store dicts whose keys are text or numbers. A ``Dict`` field may have other keys, such
as ``Decimal`` or tuples; such a dict is stored as a list of pairs, under the single key ``_PAIRS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..values.codec import Codec

_PAIRS = "\0pairs"
_KEYS = {str, int, bool, float, type(None)}
_FLAT = {str, int, bool, float, bytes, type(None)}
_CODEC = Codec(max_depth=256)  # the save applies the limit of the settings


def to_stored(name: str, dumped: Any) -> Any:
    """A schema's dump as the session stores it, in new objects.

    Raises ``ValueRefused`` if no session can store it.
    """
    return _CODEC.decode(_CODEC.encode(name, _pack(dumped)))


def from_stored(data: Any) -> Any:
    """Stored data as the schema loads it."""
    kind = type(data)
    if kind is dict:
        if len(data) != 1 and _FLAT.issuperset(map(type, data.values())):
            return data
        pairs = data.get(_PAIRS)
        if type(pairs) is list and len(data) == 1:
            try:
                return {from_stored(key): from_stored(item) for key, item in pairs}
            except (TypeError, ValueError):
                return data  # to_stored didn't make it
        return {key: from_stored(item) for key, item in data.items()}
    if kind is list:
        return [from_stored(item) for item in data]
    if kind is tuple:
        return tuple(from_stored(item) for item in data)
    return data


def copy_of_containers(value: Any) -> Any:
    """A copy of dicts, lists and tuples; the values in them are shared."""
    kind = type(value)
    if kind is dict:
        return {key: copy_of_containers(item) for key, item in value.items()}
    if kind is list:
        return [copy_of_containers(item) for item in value]
    return tuple(map(copy_of_containers, value)) if kind is tuple else value


def _pack(value: Any) -> Any:
    if isinstance(value, Mapping):
        if _KEYS.issuperset(map(type, value)) and list(value) != [_PAIRS]:
            return {key: _pack(item) for key, item in value.items()}
        return {_PAIRS: [[_pack(key), _pack(item)] for key, item in value.items()]}
    if type(value) is list:
        return [_pack(item) for item in value]
    if type(value) is tuple:
        return tuple(_pack(item) for item in value)
    return value
