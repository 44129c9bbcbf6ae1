"""Records other than sessions, such as the mark of an import. Nothing here calls the store."""

from __future__ import annotations

from collections.abc import Callable

from ..stores.base import Record, new_version
from ..values.envelope import Envelope

_FOREVER = 100 * 366 * 86_400_000  # milliseconds; the idle expiry ends such a record earlier


class OtherRecords:
    """Reads and drafts such records, which are encrypted like sessions."""

    def __init__(self, envelope: Envelope, now: Callable[[], int]) -> None:
        self._envelope = envelope
        self._now = now

    def read(self, record: Record) -> bytes:
        """The content of such a record. Raises ``UnreadableRecord``."""
        times = record.created_at, record.absolute_expires_at
        return self._envelope.open_other(record.key, record.payload, times)

    def draft(self, key: str, content: bytes, end: int) -> Record:
        """Draft a record that lasts until ``end``, in milliseconds."""
        now = min(self._now(), end)
        payload = self._envelope.seal(key, content, (now, end))
        return Record(key, new_version(), now, end, end, payload)

    def draft_renewable(self, key: str, content: bytes, end: int, old: Record | None) -> Record:
        """Like ``draft``, for a record that replaces ``old``, if any, and may end later."""
        now = self._now()
        created, last = now, now + _FOREVER
        if old is not None:
            created, last = old.created_at, old.absolute_expires_at
        payload = self._envelope.seal(key, content, (created, last))
        return Record(key, new_version(), created, min(max(now, end), last), last, payload)
