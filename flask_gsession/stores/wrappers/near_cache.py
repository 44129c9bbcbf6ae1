"""A near cache: records in this process's memory, used only while they are provably fresh.

The proof is the listener's: see ``flask_gsession.live.listener``. Three checks make it valid.
tests/simulation/near_cache_model.py shows for each what goes wrong without it:

- A record is used only if all changes at its server up to some time less than ``bound`` seconds ago
have arrived, so no earlier write is missing. - A change may arrive during a load, which could then
return an older record. So a load sets a mark, and every change of the key removes it. Without the
mark the record isn't cached. - After a lost connection, no record is used until the new one has
proven that changes arrive.

Written records aren't cached: the report of the write itself arrives later, and looks like the
report of a second write. A write drops the cached record.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from ...events import logger
from ...live.listener import now
from ...processes import process
from ..base import Clock, Record, Store
from ..parts import NEVER, Changes, Feed, NearFigures, NearReads, NearRecord, Subscriber
from .wrapper import CallWrapper

_OVERHEAD = 400  # bytes for a cached record, in addition to its payload and its decoded form
_WRITES = ("create", "save", "renew", "replace", "delete")
_SPAN = 10.0  # seconds over which we judge whether the cache is worth its cost
_PAUSE = 60.0  # seconds without the cache if it is not
_TOO_MANY = 10  # changes for each read that the cache saved
_MANY = 500  # changes per second that cost little to process
_LATE = 200  # cached records that weren't provably fresh, before we log it


class NearCache(CallWrapper, NearReads):
    """``store`` with a cache of records that provably were current less than ``bound`` seconds ago.

    Only ``near`` reads from the cache: ``load`` asks the store. ``bound``: in seconds.
    ``max_bytes``: for all cached records together. ``clock``: for the expiry of records.
    """

    def __init__(self, store: Store, bound: float, max_bytes: int, clock: Clock) -> None:
        super().__init__(store, self._called)
        assert self.changes is not None  # otherwise, the setting is refused
        self.near = self
        self.bound = bound
        self._kept = KeptRecords(self.changes, bound, max_bytes)
        self._clock = clock

    def peek(self, key: str, version: int | None = None) -> NearRecord | None:
        kept = self._kept
        entries = kept.entries
        entry = entries.get(key)
        if entry is None:
            kept.misses += 1
            return None
        record, feed = entry
        as_of = feed.exact_as_of
        # Look it up again: the change that moved ``as_of`` may have removed it just now.
        if entries.get(key) is not entry or now() - as_of >= self.bound:
            kept.bypasses += 1
            kept.late()
            return None
        if (version is not None and version != record.version) or (
            self._clock() * 1000 >= record.idle_expires_at  # another process may have renewed it
        ):
            kept.bypasses += 1
            return None
        kept.hits += 1
        return record

    def load_near(self, key: str) -> Record | None:
        process.notice()
        kept = self._kept
        mark = kept.mark(key)  # before the load, since a change or a new server removes it
        try:
            feed = kept.feed(key)
            record = self.store.load(key)
            if record is not None and record.successor is None and feed is not None:
                kept.enter(record, feed, mark)
            return record
        finally:
            kept.unmark(key, mark)

    def figures(self) -> NearFigures:
        kept = self._kept
        age = None if kept.last is None else now() - kept.last.exact_as_of
        usable = age is not None and age < self.bound
        return NearFigures(kept.hits, kept.misses, kept.bypasses, age if usable else None)

    def load(self, key: str) -> Record | None:
        return self.store.load(key)

    def _called(self, operation: str, method: Callable[..., Any], *arguments: Any) -> Any:
        if operation not in _WRITES:
            return method(*arguments)
        try:
            return method(*arguments)
        finally:  # even if the outcome is unknown
            first = arguments[0]
            if isinstance(first, Record):
                first = first.key
            self._kept.changed((first,) if isinstance(first, str) else first)


class KeptRecords(Subscriber):
    """The cached records, with the feed that covers each. Holds no reference to the store."""

    def __init__(self, changes: Changes, bound: float, max_bytes: int) -> None:
        self._changes = changes
        self._bound = bound
        self._max_bytes = max_bytes
        self.hits = self.misses = self.bypasses = 0
        self._said_late = False
        self._off_until = NEVER  # in a forked process too, which inherits the subscriptions
        self._start()
        process.register(self._start)
        changes.subscribe(self, bound / 4)

    def _start(self) -> None:
        self._lock = threading.RLock()  # a finalizer may end the listener in any thread
        self.entries: dict[str, tuple[NearRecord, Feed]] = {}
        #: the feed of the latest record
        self.last: Feed | None = None
        self._bytes = 0
        self._marks: dict[str, object] = {}
        self._heard = 0
        self._judged: tuple[float, int, int] = (now(), 0, self.hits)
        self._late = 0

    def feed(self, key: str) -> Feed | None:
        """The feed that reports changes of this record; None while the cache is off."""
        if self._off_until != NEVER:
            if now() < self._off_until:
                return None
            self._resume()
        return self._changes.feed(key)

    def _resume(self) -> None:
        with self._lock:  # other threads notice the end of the pause, too
            if self._off_until != NEVER:
                self._judged = (now(), self._heard, self.hits)
                self._changes.subscribe(self, self._bound / 4)
                self._off_until = NEVER  # last: without a subscription, a feed proves nothing

    def mark(self, key: str) -> object:
        """Set a mark that stays until the record under ``key`` may have changed."""
        return self._marks.setdefault(key, object())

    def unmark(self, key: str, mark: object) -> None:
        """Remove the mark after a load. Another load that shares it then caches nothing."""
        with self._lock:
            if self._marks.get(key) is mark:
                del self._marks[key]

    def enter(self, record: Record, feed: Feed, mark: object) -> None:
        """Cache a record, unless its mark is gone."""
        size = _size(record)
        with self._lock:
            if self._marks.get(record.key) is not mark or size > self._max_bytes:
                return
            self._drop(record.key)
            self.entries[record.key] = (NearRecord(*record), feed)
            self.last = feed
            self._bytes += size
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self.entries)))  # the oldest one

    def changed(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._heard += 1
                self._marks.pop(key, None)
                self._drop(key)
        self._judge()

    def lost(self) -> None:
        with self._lock:
            self._marks.clear()
            self.entries.clear()
            self._bytes = 0

    def _drop(self, key: str) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self._bytes -= _size(entry[0])

    def _judge(self) -> None:
        """Turn the cache off if processing all changes costs more than the saved reads.

        Every process gets the changes of all processes, but saves only its own reads.
        """
        since, heard, hits = self._judged
        span = now() - since
        if span < _SPAN:
            return
        heard, hits = self._heard - heard, self.hits - hits
        self._judged = (now(), self._heard, self.hits)
        if heard > _MANY * span and heard > _TOO_MANY * hits:
            self._off_until = now() + _PAUSE
            self._changes.unsubscribe(self)
            self.lost()
            logger.warning(
                "The near cache is off for %g s: in %.0f s this process received %d changes of "
                "sessions, and saved %d reads. With so many writes for its number of "
                "processes, this application is better off without SESSION_NEAR_CACHE.",
                _PAUSE,
                span,
                heard,
                hits,
            )

    def late(self) -> None:
        """Count a cached record that wasn't provably fresh, and log a warning if there are many."""
        self._late += 1
        if self._late >= _LATE and not self._said_late and self._late > self.hits:
            self._said_late = True
            logger.warning(
                "SESSION_NEAR_CACHE = %g is too short for this network or machine: %d records "
                "could not be used, because the server's answers came too late to prove that they "
                "were fresh enough. Allow more seconds, or set it to 0.",
                self._bound,
                self._late,
            )


def _size(record: Record) -> int:
    """The bytes of a cached record: its payload, and its decoded form after the first read."""
    return 2 * len(record.payload) + _OVERHEAD
