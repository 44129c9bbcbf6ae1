"""Converts session values to messages and back, for services in any language."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

from . import gsession_pb2 as pb

_LOWEST, _HIGHEST = -(2**63), 2**63
_TYPES: dict[type, tuple[str, Callable[[Any], str]]] = {
    datetime: ("datetime", datetime.isoformat),
    date: ("date", date.isoformat),
    time: ("time", time.isoformat),
    timedelta: ("timedelta", lambda value: repr(value.total_seconds())),
    Decimal: ("decimal", str),
    uuid.UUID: ("uuid", str),
    int: ("integer", str),  # beyond 64 bits
}
_READERS: dict[str, Callable[[str], Any]] = {
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "timedelta": lambda text: timedelta(seconds=float(text)),
    "decimal": Decimal,
    "uuid": uuid.UUID,
    "integer": int,
}
_DEEPEST = 60  # nested containers; protobuf reads about a hundred nested messages
_MOST_DIGITS = 1000


class NoMessage(ValueError):
    """A value can't become a message, or a message can't become a value; with the reason."""


def to_value(value: Any, depth: int = _DEEPEST) -> pb.Value:
    """The message of a value. Tuples and sets become lists. Raises ``NoMessage``."""
    if depth == 0:
        raise NoMessage(f"it is nested deeper than {_DEEPEST} levels")
    kind = type(value)
    if value is None:
        return pb.Value(null=pb.Absent())
    if kind is bool:
        return pb.Value(boolean=value)
    if kind is int and _LOWEST <= value < _HIGHEST:
        return pb.Value(integer=value)
    if kind is float:
        return pb.Value(number=value)
    if isinstance(value, str):
        try:
            return pb.Value(text=value)
        except ValueError:
            raise NoMessage("a text holds lone surrogates") from None
    if kind is bytes:
        return pb.Value(data=value)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [to_value(item, depth - 1) for item in value]
        return pb.Value(list=pb.List(items=items))
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise NoMessage("a dict has keys that aren't text")
        entries = {key: to_value(item, depth - 1) for key, item in value.items()}
        return pb.Value(map=pb.Map(items=entries))
    if kind in _TYPES:
        name, text_of = _TYPES[kind]
        return pb.Value(typed=pb.Typed(type=name, text=text_of(value)))
    raise NoMessage(f"values of type {kind.__name__} have no message")


def of_value(message: pb.Value) -> Any:
    """The value of a message. Raises ``NoMessage``."""
    kind = message.WhichOneof("kind")
    if kind is None:
        raise NoMessage("a value has no kind")
    if kind == "null":
        return None
    if kind == "list":
        return [of_value(item) for item in message.list.items]
    if kind == "map":
        return {key: of_value(item) for key, item in message.map.items.items()}
    if kind == "typed":
        typed = message.typed
        read = _READERS.get(typed.type)
        if read is None or len(typed.text) > _MOST_DIGITS:
            raise NoMessage(f"the type {typed.type[:40]!r} is not known, or its text is too long")
        try:
            return read(typed.text)
        except (ValueError, InvalidOperation, OverflowError):
            raise NoMessage(f"not the text of a {typed.type}") from None
    return getattr(message, kind)
