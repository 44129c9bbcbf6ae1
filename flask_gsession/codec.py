"""Session values to bytes and back, each to an equal value of the same type.

The encoding is MessagePack. What MessagePack would not bring back as it was (tuples, sets, big
integers, times, decimals, ...) travels in extension types numbered below; the numbers are part of
the stored format. Every value of a session is encoded for itself, so that one can be read, or
compared with what was loaded, without touching the others. Never pickle.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from decimal import Decimal
from enum import Enum
from typing import Any, NoReturn
from uuid import UUID
from zoneinfo import ZoneInfo

from markupsafe import Markup
from msgspec import DecodeError, Raw
from msgspec.msgpack import Decoder, Encoder, Ext

from .errors import SessionTooLarge, UnreadableRecord, UnsupportedType, ValueRefused

_BIG_INT, _TUPLE, _SET, _FROZENSET, _DATETIME, _DATE, _TIME = 1, 2, 3, 4, 5, 6, 7
_TIMEDELTA, _UUID, _DECIMAL, _MARKUP, _SURROGATES = 8, 9, 10, 11, 12
MARK, REFERENCE = 13, 14  # what stands in front of a value, and in the place of a large one

_NATIVE = frozenset({str, bool, type(None), float, bytes})

#: Types whose values cannot change after they were looked at. Tuples are not among them: a tuple
#: may hold a list.
IMMUTABLE = _NATIVE | {int, frozenset, dt.datetime, dt.date, dt.time, dt.timedelta}
IMMUTABLE |= {UUID, Decimal, Markup}

#: Types that make one of theirs of a value of a subclass.
_CONVERTING = {str, int, float, bytes, list, tuple, dict, set, frozenset, Decimal, Markup}

SUPPORTED = (
    "str, int, float, bool, None, bytes, list, tuple, dict with str keys, set, frozenset, "
    "datetime, date, time, timedelta, UUID, Decimal and Markup"
)


class _Refused(Exception):
    """Carries a refusal up to the value's top, collecting the path on the way."""

    def __init__(self, error: type[ValueRefused], reason: str) -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason
        self.path: list[str] = []


class Codec:
    """Encodes and decodes single session values.

    ``max_depth`` is how many containers may stand inside each other; it also stops cycles.
    """

    def __init__(self, max_depth: int) -> None:
        self._max_depth = max_depth
        #: gives the value that a reference stands for
        self.resolve: Callable[[bytes], Any] | None = None
        self._encode = Encoder().encode
        self._decode = Decoder(ext_hook=self._from_ext).decode

    def encode(self, key: str, value: object) -> bytes:
        """The bytes of ``session[key] = value``; equal values of equal type give equal bytes.

        Raises ``UnsupportedType`` or ``SessionTooLarge`` (too deep), naming the path.
        """
        kind = type(value)
        try:
            if kind in _NATIVE:
                return self._encode(value)
            return self._encode(self._prepare(value, self._max_depth))
        except UnicodeEncodeError:
            pass
        except _Refused as refused:
            _raise_with_path(key, refused)
        try:
            marked = _mark_surrogates(value, self._max_depth)
            return self._encode(self._prepare(marked, self._max_depth))
        except _Refused as refused:
            _raise_with_path(key, refused)

    def decode(self, raw: bytes) -> Any:
        """The value in ``raw``. Raises ``UnreadableRecord`` where there is none."""
        try:
            return self._decode(raw)
        except (DecodeError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
            raise UnreadableRecord("corrupt", type(error).__name__) from None

    def _prepare(self, value: Any, depth: int) -> Any:
        """A value that MessagePack keeps as it is; the very same object where it does already."""
        kind = type(value)
        if kind in _NATIVE:
            return value
        if kind is int:
            if -(2**63) <= value < 2**64:
                return value
            return Ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
        if kind is list:
            return self._prepare_list(value, depth)
        if kind is dict:
            return self._prepare_dict(value, depth)
        if kind is tuple:
            return Ext(_TUPLE, self._encode(self._prepare_list(value, depth)))
        if kind is set or kind is frozenset:
            # Sorted, because the order of a set differs between processes.
            items = sorted(self._encode(item) for item in self._prepare_list(value, depth))
            return Ext(_SET if kind is set else _FROZENSET, self._encode([Raw(i) for i in items]))
        if kind is _LoneSurrogates:
            return Ext(_SURROGATES, value.encode("utf-8", "surrogatepass"))
        to_ext = _TO_EXT.get(kind)
        if to_ext is None:
            raise _Refused(
                UnsupportedType,
                f"a value of type {kind.__module__}.{kind.__qualname__} cannot be kept in a "
                f"session{_instead_of(kind)}; allowed are {SUPPORTED}",
            )
        return to_ext(value)

    def _prepare_list(self, value: Iterable[Any], depth: int) -> Any:
        if depth == 0:
            _too_deep(self._max_depth)
        prepared = value
        for index, item in enumerate(value):
            if type(item) in _NATIVE:
                continue
            try:
                changed = self._prepare(item, depth - 1)
            except _Refused as refused:
                refused.path.append(f"[{index}]" if type(value) in (list, tuple) else "{...}")
                raise
            if changed is not item:
                if prepared is value:
                    prepared = list(value)
                prepared[index] = changed  # type: ignore[index]  # it is the list made above
        return prepared

    def _prepare_dict(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        if depth == 0:
            _too_deep(self._max_depth)
        prepared = value
        for key, item in value.items():
            if type(key) is not str:
                raise _Refused(
                    UnsupportedType,
                    f"dict keys must be str, not {type(key).__qualname__}; "
                    "convert them before you store the dict",
                )
            if type(item) in _NATIVE:
                continue
            try:
                changed = self._prepare(item, depth - 1)
            except _Refused as refused:
                refused.path.append(f"[{_short(key)}]")
                raise
            if changed is not item:
                if prepared is value:
                    prepared = dict(value)
                prepared[key] = changed
        return prepared

    def _from_ext(self, code: int, data: memoryview) -> Any:
        if code == _TUPLE:
            return tuple(self._decode(data))
        if code == _SET:
            return set(self._decode(data))
        if code == _FROZENSET:
            return frozenset(self._decode(data))
        if code == REFERENCE and self.resolve is not None:
            return self.resolve(bytes(data))
        from_ext = _FROM_EXT.get(code)
        if from_ext is None:
            raise ValueError("unknown extension type")
        return from_ext(bytes(data))


def _instead_of(kind: type) -> str:
    """What to keep of a value that is nearly one of ours."""
    if issubclass(kind, Enum):
        return " (keep its .value)"
    if is_dataclass(kind):
        return " (keep dataclasses.asdict() of it)"
    if hasattr(kind, "_asdict"):
        return " (keep its ._asdict())"
    for base in kind.__mro__:
        if base in _CONVERTING:
            return f" (keep {base.__name__}() of it)"
    return ""


def _raise_with_path(key: str, refused: _Refused) -> NoReturn:
    steps = "".join(reversed(refused.path[-12:]))
    if len(refused.path) > 12:
        steps = "".join(reversed(refused.path[-6:])) + "..."
    raise refused.error(f"session[{_short(key)}]{steps}", refused.reason) from None


def _too_deep(limit: int) -> NoReturn:
    raise _Refused(
        SessionTooLarge,
        f"nested more than {limit} levels deep, or contains itself (SESSION_MAX_DEPTH)",
    )


def _short(key: str) -> str:
    return ascii(key) if len(key) <= 60 else ascii(key[:57] + "...")


class _LoneSurrogates(str):
    """Marks a text that UTF-8 cannot express, so that it travels as an extension type."""

    __slots__ = ()


def _mark_surrogates(value: Any, depth: int) -> Any:
    """A copy of ``value`` with its texts that hold lone surrogates marked. The slow, rare path."""
    kind = type(value)
    if kind is str:
        return _LoneSurrogates(value) if _has_surrogates(value) else value
    if depth < 0:
        raise _Refused(SessionTooLarge, "nested too deep, or contains itself (SESSION_MAX_DEPTH)")
    if kind is dict:
        if any(type(key) is str and _has_surrogates(key) for key in value):
            raise _Refused(UnsupportedType, "a dict key holds lone surrogates: not valid text")
        items = [(f"[{_short(str(key))}]", item) for key, item in value.items()]
    elif kind in (list, tuple, set, frozenset):
        ordered = kind in (list, tuple)
        items = [(f"[{i}]" if ordered else "{...}", item) for i, item in enumerate(value)]
    else:
        items = []
    marked = []
    for step, item in items:
        try:
            marked.append(_mark_surrogates(item, depth - 1))
        except _Refused as refused:
            refused.path.append(step)
            raise
    if kind is dict:
        return dict(zip(value, marked, strict=True))
    if items:
        return kind(marked)
    if kind is Markup and _has_surrogates(value):
        raise _Refused(UnsupportedType, "a Markup holds lone surrogates: not valid text")
    return value


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def is_valid_text(text: str) -> bool:
    """Whether UTF-8 can express ``text``: it holds no lone surrogates."""
    return text.isascii() or not _has_surrogates(text)


def _time_text(value: dt.datetime | dt.time) -> bytes:
    """ISO 8601, then the fold and the time zone's name where there are any."""
    text = value.isoformat()
    zone = value.tzinfo
    name = zone.key if isinstance(zone, ZoneInfo) and zone.key else ""
    if zone is not None and not name:
        offset = value.utcoffset()
        # Python 3.11 reads an offset below one second as none at all.
        if offset is None or (offset and abs(offset) < dt.timedelta(seconds=1)):
            raise _Refused(
                UnsupportedType,
                f"a {type(value).__name__} whose time zone has neither a name nor an offset that "
                "can be written down",
            )
    if value.fold or name:
        text = f"{text};{value.fold};{name}"
    return text.encode()


def _from_time_text(kind: Callable[[str], Any], data: bytes) -> Any:
    text, _, rest = data.decode().partition(";")
    value = kind(text)
    if rest:
        fold, _, name = rest.partition(";")
        value = value.replace(fold=int(fold))
        if name:
            # For a zone that this machine does not know the offset remains: the instant is right.
            with contextlib.suppress(OSError, ValueError, KeyError):
                value = value.replace(tzinfo=ZoneInfo(name))
    return value


def _timedelta_text(value: dt.timedelta) -> bytes:
    return f"{value.days};{value.seconds};{value.microseconds}".encode()


def _from_timedelta_text(data: bytes) -> dt.timedelta:
    days, seconds, microseconds = data.split(b";")
    return dt.timedelta(int(days), int(seconds), int(microseconds))


_TO_EXT: dict[type, Callable[[Any], Ext]] = {
    dt.datetime: lambda value: Ext(_DATETIME, _time_text(value)),
    dt.date: lambda value: Ext(_DATE, value.isoformat().encode()),
    dt.time: lambda value: Ext(_TIME, _time_text(value)),
    dt.timedelta: lambda value: Ext(_TIMEDELTA, _timedelta_text(value)),
    UUID: lambda value: Ext(_UUID, value.bytes),
    Decimal: lambda value: Ext(_DECIMAL, str(value).encode()),
    Markup: lambda value: Ext(_MARKUP, value.encode()),
}

_FROM_EXT: dict[int, Callable[[bytes], Any]] = {
    _BIG_INT: lambda data: int.from_bytes(data, "big", signed=True),
    _DATETIME: lambda data: _from_time_text(dt.datetime.fromisoformat, data),
    _DATE: lambda data: dt.date.fromisoformat(data.decode()),
    _TIME: lambda data: _from_time_text(dt.time.fromisoformat, data),
    _TIMEDELTA: _from_timedelta_text,
    _UUID: lambda data: UUID(bytes=data),
    _DECIMAL: lambda data: Decimal(data.decode()),
    _MARKUP: lambda data: Markup(data.decode()),
    _SURROGATES: lambda data: data.decode("utf-8", "surrogatepass"),
}
