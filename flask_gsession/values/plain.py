"""Converts an object of another class to an equal value of a plain type.

Libraries put subclasses of ``dict``, ``str`` and others into sessions: tokens, enums, counters,
named tuples. They are stored as their base type, and an object with ``__html__``, such as a lazily
translated text, as the ``Markup`` that it renders to. Flask's own session does the same.

The methods of the plain type read the content. An object whose own methods return other content, or
that doesn't equal the result, has no plain value.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from markupsafe import Markup
from werkzeug.local import LocalProxy

#: Returned by ``plain_value`` if there is no plain value.
NO_PLAIN_VALUE: Final = object()

# Tools such as freezegun replace ``datetime.datetime`` and ``datetime.date`` by subclasses, maybe
# before this module is imported. They also replace module-level names, but not items of a tuple.
_DATE = dt.datetime.__mro__[-2]
TIMES: Final[tuple[type[dt.datetime], type[dt.date]]] = (
    next(kind for kind in dt.datetime.__mro__ if kind.__base__ is _DATE),
    _DATE,
)
del _DATE


def plain_value(value: Any) -> Any:
    """The equal value of one of the plain types, or ``NO_PLAIN_VALUE``.

    Items of a container aren't converted. Raises whatever the methods of ``value`` raise.
    """
    kind = type(value)
    if kind is LocalProxy:
        return value._get_current_object()
    for base, convert in _CONTAINERS:
        if issubclass(kind, base):
            return _equal(value, base, convert)
    if not isinstance(value, type):
        html = getattr(value, "__html__", None)
        if callable(html):
            return Markup(str(html()))
    for base, convert in _SCALARS:
        if issubclass(kind, base):
            return _equal(value, base, convert)
    return NO_PLAIN_VALUE


def plain_key(key: Any) -> Any:
    """The equal ``str``, ``int`` or ``float`` for the key of a dict, or ``NO_PLAIN_VALUE``."""
    for base, convert in _NAMES:
        if isinstance(key, base):
            plain = _equal(key, base, convert)
            return plain if hash(plain) == hash(key) else NO_PLAIN_VALUE
    return NO_PLAIN_VALUE


def _equal(value: Any, base: Any, convert: Callable[[Any], Any]) -> Any:
    try:
        plain = convert(value)
        if (
            type(value).__eq__ is base.__eq__
            or value == plain
            or (base is float and plain != plain)
        ):
            return plain
    except (KeyError, TypeError, ValueError):
        pass
    return NO_PLAIN_VALUE


def _plain_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    plain = {key: dict.__getitem__(value, key) for key in value}
    if not len(plain) == len(value) == dict.__len__(value):
        raise ValueError("its methods return other keys than it stores")
    return plain


def _as(base: Any) -> Callable[[Any], Any]:
    """A converter to a container type; refuses objects whose own methods return other items."""

    def convert(value: Any) -> Any:
        held, shown = base(base.__iter__(value)), base(iter(value))
        if not len(value) == len(held) == len(shown) or held != shown:
            raise ValueError("its methods return other items than it stores")
        return held

    return convert


def _plain_datetime(value: dt.datetime) -> dt.datetime:
    kind = TIMES[0]
    return kind.combine(kind.date(value), kind.timetz(value))


def _plain_time(value: dt.time) -> dt.time:
    return dt.time(
        value.hour, value.minute, value.second, value.microsecond, value.tzinfo, fold=value.fold
    )


# In the order in which Flask's own session looks at a value.
_CONTAINERS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (dict, _plain_dict),
    (tuple, _as(tuple)),
    (list, _as(list)),
    (set, _as(set)),
    (frozenset, _as(frozenset)),
    (bytes, lambda value: bytes.__getitem__(value, slice(None))),
)
_NAMES: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)
_SCALARS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (UUID, lambda value: UUID(int=value.int)),
    (TIMES[0], _plain_datetime),
    (TIMES[1], lambda value: TIMES[1].fromordinal(TIMES[1].toordinal(value))),
    (dt.time, _plain_time),
    (dt.timedelta, lambda value: dt.timedelta.__add__(value, dt.timedelta())),
    (Decimal, Decimal),
    *_NAMES,
)
