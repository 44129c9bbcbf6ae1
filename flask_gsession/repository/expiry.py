"""When a record expires: its idle expiry, which each use moves, and its absolute expiry.

All times are in milliseconds since 1970.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..stores.base import Clock, Record, milliseconds
from ..users.rosters import MARGIN
from ..values.payload import Body
from .idle_spans import IdleSpans
from .newcomers import Newcomers
from .permanent import PERMANENT

_BLOB_MARGIN = 60_000  # milliseconds that a large value outlives its session


class Expiry:
    """The rules for the records of one kind.

    ``lifetime``: the absolute lifetime, in milliseconds. ``newcomers`` limits new sessions.
    ``seen_interval``: the longest time between two updates of a roster entry, in seconds.
    """

    def __init__(
        self,
        clock: Clock,
        spans: IdleSpans,
        lifetime: int,
        newcomers: Newcomers | None = None,
        seen_interval: float = 0,
    ) -> None:
        self._clock = clock
        self._spans = spans
        self._usual = tuple(spans.usual)  # faster to unpack
        self._lifetime = lifetime
        self._seen_interval = int(seen_interval * 1000)
        self.newcomers = Newcomers(None, 0) if newcomers is None else newcomers
        self._unseen = self.newcomers.unseen

    def now(self) -> int:
        """The clock's time."""
        return milliseconds(self._clock)

    def latest_end(self) -> int:
        """The absolute end of a record that is created now."""
        return self.now() + self._lifetime

    def first_end(self, key: str, body: Body, absolute: int) -> int:
        """The idle expiry of a new record."""
        return self.newcomers.first_end(key, self.now(), self.idle_end(body, absolute))

    def idle_end(self, body: Body, absolute: int) -> int:
        """The idle expiry of a record that is used now, with this absolute end."""
        return self.extended_for_joins(
            min(self.now() + self._spans.of(body.values, body.lifetime).length, absolute),
            body,
            absolute,
        )

    def extended_for_joins(self, idle_end: int, body: Body, absolute: int) -> int:
        """The idle expiry, extended if a join would be forgotten before its session ends."""
        if not body.joins:  # most records
            return idle_end
        return min(max([idle_end, *(join.ends_at for join in body.joins)]), absolute)

    def due(self, record: Record, values: Mapping[str, bytes], lifetime: int | None) -> int | None:
        """The next idle expiry, or None if it need not move yet."""
        if self._unseen and record.key in self._unseen:
            return None
        if lifetime is None and PERMANENT not in values:  # most sessions
            span, step = self._usual
        else:
            span, step = self._spans.of(values, lifetime)
        absolute = record.absolute_expires_at
        end = int(self._clock() * 1000) + span
        if end > absolute:  # faster than ``min``
            end = absolute
        gain = end - record.idle_expires_at
        return end if gain >= step or (end == absolute and gain > 0) else None

    def is_too_late(self, idle_end: int, due: int, body: Body) -> bool:
        """Whether a stored idle expiry is later than the settings now allow.

        ``due``: the idle expiry by the current settings. A difference of up to one step is normal.
        """
        return idle_end - due > self._spans.of(body.values, body.lifetime).step

    def end_of_blobs(self, body: Body, absolute: int | None = None) -> int:
        """When the large values of a session expire if it is stored about now.

        ``absolute``: the session's absolute end; None for a new session.
        """
        end = self.idle_end(body, self.latest_end() if absolute is None else absolute)
        return blob_expiry(end)

    def listed_until(
        self,
        values: Mapping[str, bytes],
        lifetime: int | None,
        record: Record | None,
        *,
        signs_in: bool = False,
    ) -> int:
        """Until when a roster may list a session that is entered now, in seconds since 1970.

        Renewals within ``SESSION_SEEN_INTERVAL`` don't update the roster, so the entry lasts that
        much longer. ``record``: as it is stored; None for a new session. ``signs_in``: whether its
        absolute lifetime starts again.
        """
        absolute = self.latest_end() if record is None or signs_in else record.absolute_expires_at
        end = self.now() + self._spans.of(values, lifetime).length + self._seen_interval
        if record is not None:
            end = max(end, record.idle_expires_at)
        return (min(end, absolute) + MARGIN) // 1000


def blob_expiry(idle_end: int) -> int:
    """The expiry of the large values of a session with this idle expiry."""
    return idle_end + _BLOB_MARGIN
