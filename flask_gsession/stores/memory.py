"""Sessions in this process's memory: for tests and single-process tools. Nothing is shared."""

from __future__ import annotations

import threading

from ..errors import Gone, KeyTaken, Stale
from .base import MAX_POINTERS, Record, StoreOptions, milliseconds


class MemoryStore:
    """Keeps records in a dict. Records are immutable, so nothing is shared with the caller."""

    def __init__(self, options: StoreOptions | None = None) -> None:
        self._clock = (options or StoreOptions()).clock
        self._records: dict[str, Record] = {}
        self._lock = threading.Lock()

    def create(self, record: Record) -> None:
        self.sweep(2)
        with self._lock:
            there = self._unexpired(record.key)
            if there is not None and there.version != record.version:
                raise KeyTaken
            self._records[record.key] = record

    def load(self, key: str) -> Record | None:
        return self._unexpired(key)

    def save(self, record: Record, expected_version: int) -> None:
        with self._lock:
            there = self._unexpired(record.key)
            if there is None or there.version != record.version:
                self._expect(record.key, expected_version)
            self._records[record.key] = record

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        with self._lock:
            there = self._unexpired(record.key)
            if there is None or there.version != record.version:
                return False
            later = min(max(idle_expires_at, there.idle_expires_at), there.absolute_expires_at)
            self._records[record.key] = there._replace(idle_expires_at=later)
            return True

    def replace(
        self, key: str, record: Record, expected_version: int, pointer: Record | None
    ) -> None:
        with self._lock:
            taken = self._unexpired(record.key)
            if taken is not None and taken.version == record.version:
                return
            self._expect(key, expected_version)
            if taken is not None:
                raise KeyTaken
            self._records[record.key] = record
            if pointer is None:
                del self._records[key]
            else:
                self._records[key] = pointer

    def delete(self, key: str, expected_version: int | None = None) -> bool:
        with self._lock:
            if expected_version is not None:
                self._expect(key, expected_version)
            target = key
            for _ in range(MAX_POINTERS):
                record = self._unexpired(target)
                self._records.pop(target, None)
                if record is None or record.successor is None:
                    return record is not None
                target = record.successor
            return False

    def sweep(self, limit: int) -> int:
        """Remove expired records, oldest first, looking at no more than ``limit`` of them."""
        now = milliseconds(self._clock)
        removed = 0
        with self._lock:
            for key in list(_first(self._records, limit)):
                record = self._records.pop(key)
                if now < record.idle_expires_at:
                    self._records[key] = record  # to the end: the next call looks at others
                else:
                    removed += 1
        return removed

    def close(self) -> None:
        """Nothing to release."""

    def _unexpired(self, key: str) -> Record | None:
        record = self._records.get(key)
        if record is None or milliseconds(self._clock) >= record.idle_expires_at:
            return None
        return record

    def _expect(self, key: str, version: int) -> Record:
        record = self._unexpired(key)
        if record is None or record.successor is not None:
            raise Gone
        if record.version != version:
            raise Stale
        return record


def _first(records: dict[str, Record], count: int) -> list[str]:
    return [key for key, _ in zip(records, range(count), strict=False)]
