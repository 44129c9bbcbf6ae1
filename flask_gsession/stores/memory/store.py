"""Sessions in this process's memory: for tests and single-process tools. Nothing is shared."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterable, Sequence

from ...errors import Gone, KeyTaken, LeaseLost, Stale
from ...processes import process
from ..base import OTHER_ENDS, Deleted, Record, Store, is_session_key, milliseconds
from ..interrupts import Condition
from ..lease import Lease
from ..parts import Feed, Page, Subscriber, Tidied, itself
from ..support import StoreOptions
from .journal import MemoryJournal

_NOBODYS = Lease()


class _Blob:
    def __init__(self, expires_at: int) -> None:
        self.expires_at = expires_at
        self.frames: dict[int, bytes] = {}


class MemoryStore(Store):
    """Keeps records in a dict. Records are immutable, so nothing is shared with the caller."""

    leases = blobs = scans = upkeep = counts = changes = itself
    unproven = "the sessions are in the memory of this process anyway"
    one_feed = True
    trouble = ""

    def __init__(self, options: StoreOptions | None = None) -> None:
        self._clock = (options or StoreOptions()).clock
        self._records: dict[str, Record] = {}
        self._leases: dict[str, Lease] = {}
        self._blobs: dict[str, _Blob] = {}
        self._subscribers: tuple[Subscriber, ...] = ()
        #: Whether expired sessions stay until their end is in the journal.
        self.keeps_expired = False
        self.journal = MemoryJournal(self)
        self._begin()
        process.register(self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()  # a thread of the parent may hold the old one
        self._freed = Condition(self._lock)

    def create(self, record: Record) -> None:
        self.sweep(2)
        with self._lock:
            there = self._unexpired(record.key)
            if there is not None:
                if there.version != record.version:
                    raise KeyTaken
                return
            self._drop_lease(record.key)  # of an expired record under the key
            self._records[record.key] = record
        if self._subscribers:
            self._report(record.key)

    def load(self, key: str) -> Record | None:
        return self._records.get(key)

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        with self._lock:
            there = self._unexpired(record.key)
            if there is None or there.version != record.version:
                there = self._expect(there, expected_version, lease)
                self._records[record.key] = record if shorten else record.kept_as_long_as(there)
        if self._subscribers:
            self._report(record.key)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        with self._lock:
            there = self._unexpired(record.key)
            if there is None or there.version != record.version:
                return False
            later = min(max(idle_expires_at, there.idle_expires_at), there.absolute_expires_at)
            self._records[record.key] = there._replace(idle_expires_at=later)
        if self._subscribers:
            self._report(record.key)
        return True

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        with self._lock:
            taken = self._unexpired(record.key)
            if taken is not None and taken.version == record.version:
                return
            old = self._expect(self._unexpired(key), expected_version, lease)
            if taken is not None:
                raise KeyTaken
            self._records[record.key] = record if shorten else record.kept_as_long_as(old)
            self._drop_lease(key)
            if pointer is None:
                del self._records[key]
            else:
                self._records[key] = pointer
        if self._subscribers:
            self._report(key, record.key)

    def delete(
        self, key: str, expected_version: int | None = None, lease: str | None = None
    ) -> Deleted:
        with self._lock:
            if expected_version is not None:
                self._expect(self._unexpired(key), expected_version, lease)
            gone: list[str] = []
            record = self._pop(key, gone)
        if self._subscribers:
            self._report(*gone)
        return Deleted(record is not None, record)

    def _pop(self, key: str, gone: list[str]) -> Record | None:
        while True:  # ends, since each pointer is removed
            gone.append(key)
            record = self._unexpired(key)
            self._records.pop(key, None)
            self._drop_lease(key)
            if record is None or record.successor is None:
                return record
            key = record.successor

    def count(self) -> int:
        now = milliseconds(self._clock)
        with self._lock:
            return sum(
                record.is_live(now) and not key.endswith(tuple(OTHER_ENDS))
                for key, record in self._records.items()
            )

    def sweep(self, limit: int) -> int:
        """Remove expired records and blobs, examining at most ``limit`` of each."""
        now = milliseconds(self._clock)
        removed = 0
        with self._lock:
            for name in list(_first(self._blobs, limit)):
                blob = self._blobs.pop(name)
                if now < blob.expires_at:
                    self._blobs[name] = blob
                else:
                    removed += 1
            for key in list(_first(self._records, limit)):
                record = self._records.pop(key)
                if now < record.idle_expires_at or self._is_kept(record):
                    self._records[key] = record  # to the end, so that the next call examines others
                else:
                    self._drop_lease(key)
                    removed += 1
        return removed

    def expired(self, limit: int) -> list[Record]:
        """Sessions that have expired, for the journal."""
        now = milliseconds(self._clock)
        with self._lock:
            records = (
                record
                for record in self._records.values()
                if now >= record.idle_expires_at and self._is_kept(record)
            )
            return heapq.nsmallest(limit, records, key=lambda record: record.idle_expires_at)

    def remove_expired(self, record: Record) -> bool:
        """Remove this record if it is still there and has expired."""
        with self._lock:
            there = self._records.get(record.key)
            expired = there == record and milliseconds(self._clock) >= record.idle_expires_at
            if expired:
                del self._records[record.key]
                self._drop_lease(record.key)
        if expired and self._subscribers:
            self._report(record.key)
        return expired

    def _is_kept(self, record: Record) -> bool:
        return self.keeps_expired and record.successor is None and is_session_key(record.key)

    def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
        now = milliseconds(self._clock)
        with self._lock:
            after = (key for key in self._records if key > cursor and key.startswith(begins))
            keys = heapq.nsmallest(limit, after)
            records = [self._records[key] for key in keys]
        unexpired = [record for record in records if now < record.idle_expires_at]
        return Page(unexpired, [], keys[-1] if len(keys) == limit else "")

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        now = milliseconds(self._clock)
        with self._lock:
            keys = heapq.nsmallest(limit, (key for key in self._records if key > cursor))
            expired = [
                key
                for key in keys
                if now >= self._records[key].idle_expires_at
                and not self._is_kept(self._records[key])
            ]
            for key in [] if dry_run else expired:
                del self._records[key]
                self._drop_lease(key)
            blobs = [name for name, blob in self._blobs.items() if now >= blob.expires_at]
            for name in [] if dry_run else blobs:
                del self._blobs[name]
        end = keys[-1] if len(keys) == limit else ""
        found = {"expired sessions": len(expired), "expired large values": len(blobs)}
        return Tidied(found, len(keys), end)

    def write_frame(self, name: str, offset: int, frame: bytes, expires_at: int) -> None:
        with self._lock:
            blob = self._unexpired_blob(name)
            if blob is None:
                if offset:
                    raise Gone
                blob = self._blobs[name] = _Blob(expires_at)
            blob.frames[offset] = bytes(frame)
            blob.expires_at = max(blob.expires_at, expires_at)

    def read_frame(self, name: str, offset: int, size: int) -> bytes | None:
        blob = self._unexpired_blob(name)
        return None if blob is None else blob.frames.get(offset)

    def renew_blobs(self, names: Sequence[str], expires_at: int) -> None:
        with self._lock:
            for blob in filter(None, map(self._unexpired_blob, names)):
                blob.expires_at = max(blob.expires_at, expires_at)

    def discard_blobs(self, names: Sequence[str], at: int) -> None:
        with self._lock:
            for name in names:
                blob = self._unexpired_blob(name)
                if blob is not None:
                    blob.expires_at = min(blob.expires_at, at)
                    if self._unexpired_blob(name) is None:
                        del self._blobs[name]

    def acquire(self, key: str, owner: str, lease_ms: int, max_waiters: int) -> int:
        with self._lock:
            record = self._unexpired(key)
            if record is None or record.successor is not None:
                raise Gone
            lease = self._leases.setdefault(key, Lease())
            return lease.acquire(owner, milliseconds(self._clock), lease_ms, max_waiters)

    def extend(self, key: str, owner: str, lease_ms: int) -> bool:
        with self._lock:
            held = self._is_held(key, owner)
            if held:
                self._leases[key].hold(owner, milliseconds(self._clock), lease_ms)
            return held

    def release(self, key: str, owner: str) -> bool:
        with self._lock:
            lease = self._leases.get(key)
            if lease is None:
                return False
            held = lease.release(owner, milliseconds(self._clock))
            if lease == _NOBODYS:
                del self._leases[key]
            self._freed.notify_all()
            return held

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        def is_turn() -> bool:
            lease = self._leases.get(key)
            return lease is None or lease.is_turn_of(owner, milliseconds(self._clock))

        with self._freed:
            self._freed.wait_for(is_turn, seconds)

    def subscribe(self, subscriber: Subscriber, interval: float | None = None) -> None:
        with self._lock:
            self._subscribers = (*self._subscribers, subscriber)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        with self._lock:
            self._subscribers = tuple(each for each in self._subscribers if each is not subscriber)

    def feed(self, key: str) -> Feed | None:
        return None

    def start(self) -> None:
        """Does nothing: the thread that makes a change reports it."""

    def _report(self, *keys: str) -> None:
        for subscriber in self._subscribers:
            subscriber.changed(keys)

    def close(self) -> None:
        """Nothing to release."""

    def _unexpired(self, key: str) -> Record | None:
        record = self._records.get(key)
        if record is None or self._clock() * 1000 >= record.idle_expires_at:
            return None
        return record

    def _unexpired_blob(self, name: str) -> _Blob | None:
        blob = self._blobs.get(name)
        return None if blob is None or milliseconds(self._clock) >= blob.expires_at else blob

    def _is_held(self, key: str, owner: str) -> bool:
        lease = self._leases.get(key, _NOBODYS)
        return lease.is_held_by(owner, milliseconds(self._clock))

    def _drop_lease(self, key: str) -> None:
        if self._leases.pop(key, None) is not None:
            self._freed.notify_all()

    def _expect(self, record: Record | None, version: int, lease: str | None = None) -> Record:
        if record is None or record.successor is not None:
            raise Gone
        if lease is not None and not self._is_held(record.key, lease):
            raise LeaseLost
        if record.version != version:
            raise Stale
        return record


def _first(entries: Iterable[str], count: int) -> list[str]:
    return [key for key, _ in zip(entries, range(count), strict=False)]
