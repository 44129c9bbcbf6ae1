"""The part ``journal`` of the memory store: for tests, since it ends with the process."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from ...errors import KeyTaken
from ...processes import process
from ..base import Deleted, Record
from ..journals import Entries, Journal, JournalFigures

if TYPE_CHECKING:
    from .store import MemoryStore


class MemoryJournal(Journal):
    """One lock around each write and its entries, so that both have the same order."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._entries: deque[bytes] = deque()
        self._last = 0
        self._consumers: dict[str, int] = {}
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self._lock = threading.Lock()

    def begin(self, most: int) -> None:
        self._entries = deque(self._entries, most)
        self._store.keeps_expired = True

    def create(self, record: Record, entries: Sequence[bytes]) -> None:
        with self._lock:
            there = self._store.load(record.key)
            if there is not None and there.version != record.version:
                raise KeyTaken
            self._store.create(record)
            self._add(entries)

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        self._store.save(record, expected_version, lease, shorten=shorten)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        return self._store.renew(record, idle_expires_at)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        entries: Sequence[bytes],
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        with self._lock:
            self._store.replace(key, record, expected_version, pointer, lease, shorten=shorten)
            self._add(entries)

    def end(
        self, key: str, expected_version: int, entries: Sequence[bytes], lease: str | None = None
    ) -> Deleted:
        with self._lock:
            deleted = self._store.delete(key, expected_version, lease)
            self._add(entries)
            return deleted

    def due(self, limit: int) -> list[Record]:
        return self._store.expired(limit)

    def expire(self, expired: Sequence[tuple[Record, bytes]]) -> int:
        removed = 0
        with self._lock:
            for record, entry in expired:
                if self._store.remove_expired(record):
                    self._add([entry])
                    removed += 1
        return removed

    def recover(self) -> int:
        return 0

    def append(self, entries: Sequence[bytes], key: str | None = None) -> None:
        with self._lock:
            self._add(entries)

    def _add(self, entries: Sequence[bytes]) -> None:
        self._entries.extend(entries)
        self._last += len(entries)

    def read(self, after: int, limit: int) -> Entries:
        with self._lock:
            first = self._last - len(self._entries) + 1
            start = max(after + 1, first)
            found = islice(self._entries, start - first, start - first + limit)
            return Entries(list(enumerate(found, start)), first)

    def acknowledge(self, consumer: str, number: int) -> None:
        with self._lock:
            self._consumers[consumer] = max(number, self._consumers.get(consumer, 0))

    def acknowledged(self, consumer: str) -> int | None:
        return self._consumers.get(consumer)

    def forget(self, consumer: str) -> bool:
        return self._consumers.pop(consumer, None) is not None

    def figures(self) -> JournalFigures:
        due = self._store.expired(2**31)
        with self._lock:
            first = self._last - len(self._entries) + 1 if self._entries else 0
            oldest = min((record.idle_expires_at for record in due), default=0)
            last = self._last if self._entries else 0
            return JournalFigures(first, last, len(due), oldest, dict(self._consumers))
