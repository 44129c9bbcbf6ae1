"""The records of sessions: from a body to the record that a store holds, and back.

Nothing here calls the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from msgspec.structs import replace

from ..config import Settings
from ..errors import SettingError, UnreadableRecord
from ..stores.base import Record, new_version
from ..tokens import Token, is_token, new_token, session_key
from ..values.damage import DECODING_ERRORS, check_damage
from ..values.envelope import Envelope
from ..values.marks import END_OF_TIME
from ..values.payload import Body, BodyFormat, Owner, decode_body
from .expiry import Expiry


class SessionRecords:
    """Reads and drafts the records of sessions.

    ``new_token``: makes the token and the key of a session that is created or rotated.
    """

    def __init__(
        self,
        bodies: BodyFormat,
        envelope: Envelope,
        expiry: Expiry,
        new_token: Callable[[], tuple[str, str]],
    ) -> None:
        self._bodies = bodies
        self._envelope = envelope
        self._expiry = expiry
        self._new_token = new_token

    def with_rules(
        self, expiry: Expiry, new_token: Callable[[], tuple[str, str]]
    ) -> SessionRecords:
        """A copy for records with other expiry rules and keys."""
        return SessionRecords(self._bodies, self._envelope, expiry, new_token)

    # -- from a record

    def read(self, key: str, record: Record) -> Body | None:
        """Decode the record under ``key``; None for a pointer.

        Raises ``UnreadableRecord``, also for a record that belongs to another key.
        """
        created, idle, absolute, payload, successor = record[2:]
        # The idle expiry may lie before the creation, if a clock was set back or is far behind.
        if not (0 <= created <= absolute and 0 <= idle <= absolute < END_OF_TIME):
            raise UnreadableRecord("corrupt", "times out of order")
        if successor is not None:
            content = self._envelope.open(key, payload, (created, absolute, idle))
            if content != successor.encode("utf-8", "replace"):
                raise UnreadableRecord("corrupt", "pointer mismatch")
            return None
        content = self._envelope.open(key, payload, (created, absolute))
        try:
            return decode_body(content)
        except DECODING_ERRORS as error:
            check_damage(decode_body, content, error)

    def contents(self, record: Record) -> Body | None:
        """The body of a record, or None if it can't be read."""
        try:
            return self.read(record.key, record)
        except UnreadableRecord:
            return None

    # -- to a record

    def draft_new(self, body: Body) -> tuple[str, Record]:
        """Draft a new session: its token and its record."""
        token, key = self._new_token()
        now, absolute = self._expiry.now(), self._expiry.latest_end()
        idle_end = self._expiry.first_end(key, body, absolute)
        number, content = self._bodies.encode(body)
        payload = self._envelope.seal(key, content, (now, absolute), number)
        return token, Record(key, new_version(), now, idle_end, absolute, payload)

    def draft_imported(self, key: str, body: Body, began: int | None, ends: int | None) -> Record:
        """Draft the record under ``key`` for a session that is taken over.

        ``began`` and ``ends``: its creation and absolute end in the old system, to keep them.
        """
        now, absolute = self._expiry.now(), self._expiry.latest_end()
        if ends is not None:
            absolute = min(ends, absolute)
        created = now if began is None else min(began, now, absolute)
        idle_end = self._expiry.idle_end(body, absolute)
        number, content = self._bodies.encode(body)
        payload = self._envelope.seal(key, content, (created, absolute), number)
        return Record(key, new_version(), created, idle_end, absolute, payload)

    def draft_next(
        self, old: Record, body: Body, restart_idle: bool = False, renew: bool = True
    ) -> Record:
        """Draft the record that replaces ``old``.

        The idle expiry moves if that is due and ``renew`` is true, and always with
        ``restart_idle``.
        """
        key, _, created, idle_end, absolute = old[:5]
        if restart_idle:
            idle_end = self._expiry.idle_end(body, absolute)
        elif renew:
            idle_end = self._expiry.due(old, body.values, body.lifetime) or idle_end
        if body.joins:
            idle_end = self._expiry.extended_for_joins(idle_end, body, absolute)
        number, content = self._bodies.encode(body, partial(self._values_of, old))
        payload = self._envelope.seal(key, content, (created, absolute), number)
        return Record(key, new_version(), created, idle_end, absolute, payload)

    def draft_rotated(
        self, old: Record, body: Body, *, renew: bool = True, signs_in: bool = False
    ) -> tuple[str, Record]:
        """Draft a new token and record for the session of ``old``.

        The idle expiry moves if ``renew`` is true. With ``signs_in``, the absolute lifetime starts
        again.
        """
        token, key = self._new_token()
        created, absolute = old.created_at, old.absolute_expires_at
        if signs_in:
            created, absolute, renew = self._expiry.now(), self._expiry.latest_end(), True
        idle_end = self._expiry.idle_end(body, absolute) if renew else old.idle_expires_at
        number, content = self._bodies.encode(body, partial(self._values_of, old))
        payload = self._envelope.seal(key, content, (created, absolute), number)
        return token, Record(key, new_version(), created, idle_end, absolute, payload)

    def draft_pointer(self, old: Record, record: Record, grace: float) -> Record:
        """Draft the pointer from ``old`` to its successor ``record``, for ``grace`` seconds."""
        created, absolute = old.created_at, old.absolute_expires_at
        end = min(self._expiry.now() + int(grace * 1000), absolute)
        content = record.key.encode("ascii")
        payload = self._envelope.seal(old.key, content, (created, absolute, end))
        return old._replace(
            version=record.version, idle_expires_at=end, payload=payload, successor=record.key
        )

    def with_body(self, old: Record, body: Body, idle_end: int | None = None) -> Record:
        """The next version of ``old`` with this body, and with another idle expiry, if given."""
        times = old.created_at, old.absolute_expires_at
        number, content = self._bodies.encode(body, partial(self._values_of, old))
        return old._replace(
            version=new_version(),
            idle_expires_at=old.idle_expires_at if idle_end is None else idle_end,
            payload=self._envelope.seal(old.key, content, times, number),
        )

    def with_owner(self, old: Record, body: Body, owner: Owner) -> Record:
        """The next version of the record, with this owner."""
        return self.with_body(old, replace(body, owner=owner))

    def with_times(self, record: Record, other: Record) -> Record:
        """``other``, a copy of ``record`` with other times, once its payload is bound to them."""

        def times(of: Record) -> tuple[int, ...]:
            fixed = of.created_at, of.absolute_expires_at
            return fixed if of.successor is None else (*fixed, of.idle_expires_at)

        payload = self._envelope.seal_again(record.key, record.payload, times(record), times(other))
        return other._replace(payload=payload)

    def _values_of(self, record: Record) -> Mapping[str, bytes]:
        """The encoded values in a record that is about to be replaced."""
        body = self.read(record.key, record)
        return {} if body is None else body.values


def new_session_token(settings: Settings) -> tuple[str, str]:
    """A new token, and its key."""
    factory = settings.token_factory
    if factory is None:
        token = new_token(settings.id_length)
    else:
        made: object = factory()
        token = Token(made)
        if not isinstance(made, str) or not is_token(made):
            raise SettingError(
                "SESSION_TOKEN_FACTORY must return a str of 22 to 200 characters of "
                f"A-Z a-z 0-9 - _; it returned a {type(made).__name__} that doesn't match"
            )
    return token, session_key(token)
