"""The body of a session: its encoded values and what else is stored with them.

::

    body        MessagePack array: a map of the keys to the encoded values, each of them a binary
                string; the session's own idle lifetime; whether any value has a mark; the end of
                debugging for this session; whether any value is a reference; the owner; the origin;
                what edge nodes have settled; the joins

So one value can be decoded without the others. Fields at the end are omitted if they have their
defaults. New fields go at the end of the array, so that older bodies stay readable. ``envelope``
binds an encoded body to its record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.msgpack import Decoder, Encoder
from msgspec.structs import astuple

from ..errors import SessionTooLarge, UnsupportedType
from .codec import is_valid_text
from .envelope import FORMAT, OWNED, WITH_REFERENCES
from .marks import END_OF_TIME
from .references import length_of

#: The upper limit for all stores, since MongoDB refuses documents of 16 MiB.
MOST_BYTES = 15 * 1024 * 1024


_Milliseconds = Annotated[int, Meta(ge=0, lt=END_OF_TIME)]


class Owner(Struct, array_like=True, frozen=True, omit_defaults=True):
    """The user that a session is bound to, and the session's place in the user's roster.

    Times are in seconds. ``seen``: when it was last entered in the roster; 0 if a request must look
    it up there first. ``until``: when it ends at the latest, according to the roster.
    ``predecessor``: the session that it was rotated from, which the roster may list in its place.
    ``signed_in``: when the user signed in, rounded up; 0 after a sign-in by a remember-me cookie.
    """

    user_id: str
    device_id: str
    seen: _Milliseconds
    until: _Milliseconds
    predecessor: str | None = None
    signed_in: _Milliseconds = 0

    def __repr__(self) -> str:
        return f"<Owner device={self.device_id!r}>"


class Origin(Struct, array_like=True, frozen=True):
    """The old session that this one was imported from; see ``moving.mark``.

    ``label``: of the source. ``mark``: the key of the mark. ``sealed``: the old record's name,
    encrypted with the secret key. ``expires_at``: the old record's expiry at the time of the
    import, in milliseconds.
    """

    label: str
    mark: str
    nonce: bytes
    sealed: bytes
    expires_at: int | None

    def __repr__(self) -> str:
        return f"<Origin {self.label}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("label", self.label)]


class Join(Struct, array_like=True, frozen=True, omit_defaults=True):
    """A visitor's values that will join, or have joined, the values of a user: see ``joins``.

    A session has these values under ``keys``. Its ``id`` stays the same through rotations, and
    ``revision`` grows with each save. A user's record holds the revision that has joined and its
    ``values``; once the sign-in is complete, the revision is ``CLOSED``, without values.
    ``ends_at``: when the join can be forgotten, in milliseconds.
    """

    id: bytes
    revision: _Milliseconds
    values: dict[str, Annotated[bytes, Meta(min_length=1)]] = {}  # never changed
    ends_at: _Milliseconds = 0
    keys: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Join revision={self.revision}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("revision", self.revision)]


#: The revision of a join that is closed: no session has a later one.
CLOSED = END_OF_TIME - 1


class Body(Struct, array_like=True, gc=False):
    """The contents of a payload: the encoded values by key, and the session's own idle lifetime.

    ``lifetime`` is in milliseconds; None means the application's setting. ``marked``: whether any
    value has a mark (see ``marks``). ``debug_until``: the end of debugging for this session, in
    milliseconds since 1970. ``has_large``: whether any value is a reference to a large value (see
    ``references``). ``owner``: the user that the session is bound to. ``origin``: of a session that
    was imported from another library or store. ``settled``: the number of the last change that
    each edge node settled here. ``joins``: the joins of the next sign-in; in a user's record, the
    joins that have happened.
    """

    values: dict[str, Annotated[bytes, Meta(min_length=1)]]
    lifetime: _Milliseconds | None = None
    marked: bool = False
    debug_until: _Milliseconds | None = None
    has_large: bool = False
    owner: Owner | None = None
    origin: Origin | None = None
    settled: dict[str, _Milliseconds] | None = None
    joins: tuple[Join, ...] = ()

    def __repr__(self) -> str:
        size = sum(map(len, self.values.values()))
        return f"<Body: {len(self.values)} keys, {size} bytes>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("keys", len(self.values))]


#: Decodes an encoded body; its values stay encoded.
decode_body = Decoder(Body).decode
_encode = Encoder().encode
_DEFAULTS: tuple[object, ...] = (..., None, False, None, False, None, None, None, ())

#: Returns the stored values, which may exceed a limit that was lowered since.
Before = Callable[[], Mapping[str, bytes]]


class BodyFormat:
    """Encodes bodies, within the limits on size and number of keys."""

    def __init__(self, max_bytes: int, max_keys: int) -> None:
        self._max_bytes = max_bytes
        self._max_keys = max_keys

    def encode(self, body: Body, before: Before | None = None) -> tuple[int, bytes]:
        """The number of the format that the body needs, and the encoded body.

        The body may exceed a limit if it is no larger than the values that ``before`` returns.
        Raises ``SessionTooLarge``, or ``UnsupportedType`` for a key that isn't valid text.
        """
        values, number = body.values, FORMAT
        if len(values) > self._max_keys:
            self._check_keys(values, before)
        is_simple = not (body.marked or body.has_large or body.owner or body.joins)
        try:
            if is_simple and not (body.debug_until or body.origin or body.settled):
                encoded = _encode((values, body.lifetime))
            else:
                number, encoded = _encode_all(body)
        except UnicodeEncodeError:
            raise _not_text(values) from None
        if len(encoded) > self._max_bytes:
            self._check_bytes(len(encoded), values, before)
        return number, encoded

    def _check_keys(self, values: Mapping[str, bytes], before: Before | None) -> None:
        if before is None or len(values) > len(before()):
            raise SessionTooLarge(
                "session", f"{len(values)} keys; SESSION_MAX_KEYS allows {self._max_keys}"
            )

    def _check_bytes(self, size: int, values: Mapping[str, bytes], before: Before | None) -> None:
        if before is None or size > MOST_BYTES or _size(values) > _size(before()):
            largest = max(values, key=lambda key: len(key) + len(values[key]))
            raise SessionTooLarge(
                "session",
                f"{size} bytes; SESSION_MAX_BYTES allows {self._max_bytes}; "
                f"the largest key is {ascii(largest)[:60]}",
            )


def _encode_all(body: Body) -> tuple[int, bytes]:
    """The format and the encoded body, without the defaults at its end."""
    number = WITH_REFERENCES if body.has_large else FORMAT
    if body.owner is not None:
        number = OWNED
        if not (body.origin or body.settled or body.joins):  # most sessions of users
            before = body.values, body.lifetime, body.marked, body.debug_until, body.has_large
            return number, _encode((*before, body.owner))
    fields = astuple(body)
    while len(fields) > 2 and fields[-1] == _DEFAULTS[len(fields) - 1]:
        fields = fields[:-1]
    return number, _encode(fields)


def _not_text(values: Mapping[str, bytes]) -> UnsupportedType:
    """The error for the first key that can't be encoded."""
    bad = next(key for key in values if not is_valid_text(key))
    return UnsupportedType(
        f"session[{ascii(bad)[:60]}]", "a key with lone surrogates isn't valid text"
    )


def _size(values: Mapping[str, bytes]) -> int:
    """The bytes of these keys and values, including large values."""
    return sum(len(key.encode()) + length_of(raw) for key, raw in values.items())
