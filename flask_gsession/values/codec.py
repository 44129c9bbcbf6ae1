"""Session values to bytes and back, to an equal value of the same type.

The encoding is MessagePack. Types that MessagePack lacks (tuples, sets, big integers, times,
decimals, ...) use the extension types numbered below; the numbers are part of the stored format.
Each value of a session is encoded separately, so one can be decoded, or compared with its loaded
bytes, without touching the others. Nothing is pickled.
"""

from __future__ import annotations

import datetime as dt
import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from decimal import Decimal
from enum import Enum
from functools import partial
from typing import Any, NoReturn
from uuid import UUID
from zoneinfo import ZoneInfo

from markupsafe import Markup
from msgspec import Raw
from msgspec.msgpack import Decoder, Encoder, Ext

from ..errors import SessionTooLarge, UnsupportedType, ValueRefused
from .damage import DECODING_ERRORS, DEEPEST, check_damage
from .plain import NO_PLAIN_VALUE, TIMES, plain_key, plain_value

_BIG_INT, _TUPLE, _SET, _FROZENSET, _DATETIME, _DATE, _TIME = 1, 2, 3, 4, 5, 6, 7
_TIMEDELTA, _UUID, _DECIMAL, _MARKUP, _SURROGATES = 8, 9, 10, 11, 12
MARK, REFERENCE = 13, 14  # a header before a value, and a reference to a large value
_PAIRS = 15  # a dict with keys other than str, as alternating keys and values
# ``damage`` lists the types whose data is an array.

_DATETIME_TYPE, _DATE_TYPE = TIMES
_NATIVE = frozenset({str, bool, type(None), float, bytes})
_NATIVE_IN_UTF8 = _NATIVE - {str}
_TEXT = frozenset({str})
_LEAST, _MOST = -(2**63), 2**64 - 1  # the integers of MessagePack
#: The types of dict keys. Equal keys of different types, such as 1 and True, are one key in Python.
_KEYS = frozenset({str, int, bool, type(None), float})

#: Immutable types. A tuple isn't among them, since it may hold a list.
IMMUTABLE = _NATIVE | {int, frozenset, _DATETIME_TYPE, _DATE_TYPE, dt.time, dt.timedelta}
IMMUTABLE |= {UUID, Decimal, Markup}

SUPPORTED = (
    "str, int, float, bool, None, bytes, list, tuple, dict, set, frozenset, "
    "datetime, date, time, timedelta, UUID, Decimal and Markup"
)


class _Refused(Exception):
    """Collects the path while a refusal travels up to the top of the value."""

    def __init__(self, error: type[ValueRefused], reason: str) -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason
        self.path: list[str] = []


class Codec:
    """Encodes and decodes single session values.

    ``max_depth`` limits how deep containers may be nested; it also stops cycles.
    """

    def __init__(self, max_depth: int) -> None:
        self._max_depth = max_depth
        #: returns the value behind a reference
        self.resolve: Callable[[bytes], Any] | None = None
        self._native = _NATIVE
        self._encode = Encoder().encode
        self._decode = Decoder(ext_hook=self._from_ext).decode
        self._for_surrogates: Codec | None = None
        self._for_deep: Codec | None = None

    def encode(self, key: str, value: object) -> bytes:
        """The bytes of ``session[key] = value``; equal values of equal type give equal bytes.

        Raises ``UnsupportedType`` or ``SessionTooLarge`` (too deep), naming the path.
        """
        try:
            kind = type(value)
            if kind in _NATIVE or (kind is int and _LEAST <= value <= _MOST):  # type: ignore[operator]
                return self._encode(value)
            return self._encode(self._prepare(value, self._max_depth))
        except UnicodeEncodeError:
            pass
        except _Refused as refused:
            _raise_with_path(key, refused)
        if self._for_surrogates is None:
            self._for_surrogates = _SurrogateCodec(self._max_depth)
        return self._for_surrogates.encode(key, value)

    def encode_deeper(self, key: str, value: object) -> bytes:
        """As ``encode``, with the depth limit at its maximum."""
        if self._for_deep is None:
            self._for_deep = Codec(DEEPEST)
        return self._for_deep.encode(key, value)

    def decode(self, raw: bytes) -> Any:
        """The value in ``raw``. Raises ``UnreadableRecord`` if it is malformed."""
        try:
            return self._decode(raw)
        except DECODING_ERRORS as error:
            check_damage(self._decode, raw, error)

    def _prepare(self, value: Any, depth: int) -> Any:
        """An equivalent value in MessagePack's types; ``value`` itself if it has only those."""
        kind = type(value)
        if kind is list:
            items: Iterable[tuple[Any, Any]] = enumerate(value)
        elif kind is dict:
            if not _TEXT.issuperset(map(type, value)):
                return self._prepare_pairs(value, depth)
            items = value.items()
        else:
            return self._prepare_other(value, kind, depth)
        if depth == 0:
            _too_deep(self._max_depth)
        prepared, native = value, self._native
        for place, item in items:
            inner = type(item)
            if inner in native or (inner is int and _LEAST <= item <= _MOST):
                continue
            try:
                changed = self._prepare(item, depth - 1)
            except _Refused as refused:
                refused.path.append(f"[{_short(place)}]")
                raise
            if changed is not item:
                if prepared is value:
                    prepared = value.copy()
                prepared[place] = changed
        return prepared

    def _prepare_other(self, value: Any, kind: type, depth: int) -> Any:
        """The same for a value that is neither a list nor a dict."""
        if kind in self._native:
            return value
        if kind is int:
            if _LEAST <= value <= _MOST:
                return value
            return Ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
        if kind is tuple:
            return Ext(_TUPLE, self._encode(self._prepare([*value], depth)))
        if kind is set or kind is frozenset:
            try:
                prepared = self._prepare([*value], depth)
            except _Refused as refused:
                refused.path[-1:] = ["{...}"] * bool(refused.path)  # a set has no indexes
                raise
            # Sorted, because the order of a set differs between processes.
            items = [Raw(item) for item in sorted(map(self._encode, prepared))]
            return Ext(_SET if kind is set else _FROZENSET, self._encode(items))
        to_ext = _TO_EXT.get(kind)
        if to_ext is not None:
            return to_ext(value)
        plain = plain_value(value)
        if plain is NO_PLAIN_VALUE:
            raise _Refused(
                UnsupportedType,
                f"a session can't store a value of type {kind.__module__}.{kind.__qualname__}"
                f"{_alternative_to(kind)}; allowed: {SUPPORTED}",
            )
        return self._prepare(plain, depth)

    def _prepare_pairs(self, value: dict[Any, Any], depth: int) -> Any:
        """A dict with a key of another type than str."""
        if depth == 0:
            _too_deep(self._max_depth)
        plain = {_plain_key(key): item for key, item in value.items()}
        if len(plain) != len(value):
            raise _Refused(UnsupportedType, "two keys of a dict would become equal when stored")
        if all(type(key) is str for key in plain):
            return self._prepare(plain, depth)
        pairs: list[Any] = []
        for key, item in plain.items():
            try:
                pairs += (self._prepare(key, depth), self._prepare(item, depth - 1))
            except _Refused as refused:
                refused.path.append(f"[{_short(key)}]")
                raise
        return Ext(_PAIRS, self._encode(pairs))

    def _from_ext(self, code: int, data: memoryview) -> Any:
        if code == _TUPLE:
            return tuple(self._decode(data))
        if code == _SET:
            return set(self._decode(data))
        if code == _FROZENSET:
            return frozenset(self._decode(data))
        if code == _PAIRS:
            pairs = self._decode(data)
            return dict(zip(pairs[::2], pairs[1::2], strict=True))
        if code == REFERENCE and self.resolve is not None:
            return self.resolve(bytes(data))
        from_ext = _FROM_EXT.get(code)
        if from_ext is None:
            raise ValueError("unknown extension type")
        return from_ext(bytes(data))


class _SurrogateCodec(Codec):
    """Encodes values that contain text with lone surrogates, which isn't valid UTF-8."""

    def __init__(self, max_depth: int) -> None:
        super().__init__(max_depth)
        self._native = _NATIVE_IN_UTF8

    def encode(self, key: str, value: object) -> bytes:
        try:
            return self._encode(self._prepare(value, self._max_depth))
        except _Refused as refused:
            _raise_with_path(key, refused)

    def _prepare(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is str:
            if is_valid_text(value):
                return value
            return Ext(_SURROGATES, value.encode("utf-8", "surrogatepass"))
        if kind is Markup and not is_valid_text(value):
            raise _Refused(UnsupportedType, "a Markup with lone surrogates isn't valid text")
        if kind is dict and any(type(key) is str and not is_valid_text(key) for key in value):
            raise _Refused(UnsupportedType, "a dict key with lone surrogates isn't valid text")
        return super()._prepare(value, depth)


def _plain_key(key: Any) -> Any:
    """A key of a dict as it is stored."""
    plain = key if type(key) in _KEYS else plain_key(key)
    if plain is NO_PLAIN_VALUE or plain != plain:
        raise _Refused(
            UnsupportedType,
            f"dict keys must be str, int, float, bool or None, not {type(key).__qualname__}"
            f"{' NaN' if plain != plain else ''}; convert them before you store the dict",
        )
    return plain


def _alternative_to(kind: type) -> str:
    """A hint for types that are easy to convert."""
    if issubclass(kind, Enum):
        return " (store its .value)"
    if is_dataclass(kind):
        return " (store dataclasses.asdict() of it)"
    if hasattr(kind, "_asdict"):
        return " (store its ._asdict())"
    if issubclass(kind, Mapping):
        return " (store dict() of it)"
    for base in (list, tuple, set, frozenset, bytes):
        if issubclass(kind, base):
            return f" (store {base.__name__}() of it)"
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


def _short(key: object) -> str:
    if isinstance(key, str):
        return ascii(key) if len(key) <= 60 else ascii(key[:57] + "...")
    if isinstance(key, int) and key.bit_length() > 64:  # Python may refuse a decimal conversion
        return hex(key)[:60]
    return ascii(key)


def is_valid_text(text: str) -> bool:
    """Whether ``text`` is valid UTF-8, without lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _time_text(value: dt.datetime | dt.time) -> bytes:
    """ISO 8601, followed by the fold and the time zone's name, if there are any."""
    text = value.isoformat()
    zone = value.tzinfo
    name = zone.key if isinstance(zone, ZoneInfo) and zone.key else ""
    if zone is not None and not name:
        offset = value.utcoffset()
        # Python 3.11 drops an offset of less than one second when it parses the text.
        if offset is None or (offset and abs(offset) < dt.timedelta(seconds=1)):
            raise _Refused(
                UnsupportedType,
                f"a {type(value).__name__} whose time zone has neither a name nor an offset that "
                "ISO 8601 can express",
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
        if name and (zone := _zone(name)) is not None:
            value = value.replace(tzinfo=zone)
    return value


def _zone(name: str) -> ZoneInfo | None:
    """None for a zone that this machine doesn't know: the offset still gives the right instant."""
    try:
        return ZoneInfo(name)
    except (ValueError, KeyError):
        return None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EINTR):
            raise  # the machine may know the zone, but failed to read it
        return None


def _timedelta_text(value: dt.timedelta) -> bytes:
    return f"{value.days};{value.seconds};{value.microseconds}".encode()


def _from_timedelta_text(data: bytes) -> dt.timedelta:
    days, seconds, microseconds = data.split(b";")
    return dt.timedelta(int(days), int(seconds), int(microseconds))


_TO_EXT: dict[type, Callable[[Any], Ext]] = {
    _DATETIME_TYPE: lambda value: Ext(_DATETIME, _time_text(value)),
    _DATE_TYPE: lambda value: Ext(_DATE, value.isoformat().encode()),
    dt.time: lambda value: Ext(_TIME, _time_text(value)),
    dt.timedelta: lambda value: Ext(_TIMEDELTA, _timedelta_text(value)),
    UUID: lambda value: Ext(_UUID, value.bytes),
    Decimal: lambda value: Ext(_DECIMAL, str(value).encode()),
    Markup: lambda value: Ext(_MARKUP, value.encode()),
}

_date_of = _DATE_TYPE.fromisoformat
_FROM_EXT: dict[int, Callable[[bytes], Any]] = {
    _BIG_INT: lambda data: int.from_bytes(data, "big", signed=True),
    _DATETIME: partial(_from_time_text, _DATETIME_TYPE.fromisoformat),
    _DATE: lambda data: _date_of(data.decode()),
    _TIME: partial(_from_time_text, dt.time.fromisoformat),
    _TIMEDELTA: _from_timedelta_text,
    _UUID: lambda data: UUID(bytes=data),
    _DECIMAL: lambda data: Decimal(data.decode()),
    _MARKUP: lambda data: Markup(data.decode()),
    _SURROGATES: lambda data: data.decode("utf-8", "surrogatepass"),
}
