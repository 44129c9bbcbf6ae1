"""A near cache: records in this process's memory, used while they are provably fresh.

The proof is the listener's: see ``flask_gsession.live.listener``. Three checks make it valid.
tests/simulation/near_cache_model.py shows for each what goes wrong without it:

- A record is used only while the changes at its server were heard completely up to less than
  ``bound`` seconds ago: nothing that was written earlier than that is missing.
- A change may be heard while a load is on its way, which would then bring back an older record. So
  a load leaves a mark, and every change of its key removes it. Without the mark the record isn't
  kept.
- After a cut, no record is used until the new connection has proven that it hears changes.

The records of writes aren't kept: the report of the write itself comes back, and looks like the
report of another write right after it. A write drops the record that was kept before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from ...events import logger
from ...live.listener import now
from ...processes import process
from ..base import Clock, Record, Store
from ..parts import NEVER, Changes, Feed, Hearer, NearFigures, NearReads, NearRecord
from .wrapper import CallWrapper

_OVERHEAD = 400  # bytes that a kept record takes, beside its payload and its decoded form
_WRITES = ("create", "save", "renew", "replace", "delete")
_SPAN = 10.0  # seconds over which it is judged whether the cache is worth its cost
_PAUSE = 60.0  # seconds without it where it is not
_TOO_MANY = 10  # changes heard for each read that was spared
_MANY = 500  # changes in a second, up to which hearing them costs little
_LATE = 200  # records that were kept but not proven fresh, before we log it


class NearCache(CallWrapper, NearReads):
    """``store``, with records that were loaded less than a bound ago, or didn't change since.

    Only ``near`` reads from the cache: ``load`` asks the store. ``bound``: the age in seconds that
    a record may have. ``max_bytes``: of all kept records together. ``clock`` judges whether a
    record expired.
    """

    def __init__(self, store: Store, bound: float, max_bytes: int, clock: Clock) -> None:
        super().__init__(store, self._called)
        assert self.changes is not None  # or the setting was refused
        self.near = self
        self.bound = bound
        self._kept = Kept(self.changes, bound, max_bytes)
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
        # Looked up once more: a change that made ``as_of`` newer may have removed it just now.
        if entries.get(key) is not entry or now() - as_of >= self.bound:
            kept.bypasses += 1
            kept.late()
            return None
        if (version is not None and version != record.version) or (
            self._clock() * 1000 >= record.idle_expires_at  # it may have been renewed elsewhere
        ):
            kept.bypasses += 1
            return None
        kept.hits += 1
        return record

    def load_near(self, key: str) -> Record | None:
        process.notice()
        kept = self._kept
        mark = kept.mark(key)  # first: from here on a change, or another server, removes it
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
        finally:  # also where the outcome is unknown
            first = arguments[0]
            if isinstance(first, Record):
                first = first.key
            self._kept.changed((first,) if isinstance(first, str) else first)


class Kept(Hearer):
    """The records that are kept, with the feed that speaks for each. Refers to no store."""

    def __init__(self, changes: Changes, bound: float, max_bytes: int) -> None:
        self._changes = changes
        self._bound = bound
        self._max_bytes = max_bytes
        self.hits = self.misses = self.bypasses = 0
        self._said_late = False
        self._start()
        process.register(self._start)
        changes.hear(self, bound / 4)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self.entries: dict[str, tuple[NearRecord, Feed]] = {}
        #: the feed of the record that came last
        self.last: Feed | None = None
        self._bytes = 0
        self._marks: dict[str, object] = {}
        self._heard = 0
        self._judged: tuple[float, int, int] = (now(), 0, self.hits)
        self._off_until = NEVER
        self._late = 0

    def feed(self, key: str) -> Feed | None:
        """The feed on which changes of this record are heard; None while the cache is off."""
        if self._off_until != NEVER:
            if now() < self._off_until:
                return None
            self._off_until = NEVER
            self._judged = (now(), self._heard, self.hits)
            self._changes.hear(self, self._bound / 4)
        return self._changes.feed(key)

    def mark(self, key: str) -> object:
        """A mark that stays until the record under ``key`` may have changed."""
        return self._marks.setdefault(key, object())

    def unmark(self, key: str, mark: object) -> None:
        """The load is over; another load that shares the mark then keeps nothing."""
        with self._lock:
            if self._marks.get(key) is mark:
                del self._marks[key]

    def enter(self, record: Record, feed: Feed, mark: object) -> None:
        """Keep a record, unless its mark is gone."""
        size = _size(record)
        with self._lock:
            if self._marks.get(record.key) is not mark or size > self._max_bytes:
                return
            self._drop(record.key)
            self.entries[record.key] = (NearRecord(*record), feed)
            self.last = feed
            self._bytes += size
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self.entries)))  # the one that came first

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
        """Turn the cache off where hearing all changes costs more than the reads it spares.

        Every process hears the changes of all of them, and is spared its own reads only.
        """
        since, heard, hits = self._judged
        span = now() - since
        if span < _SPAN:
            return
        heard, hits = self._heard - heard, self.hits - hits
        self._judged = (now(), self._heard, self.hits)
        if heard > _MANY * span and heard > _TOO_MANY * hits:
            self._off_until = now() + _PAUSE
            self._changes.leave(self)
            self.lost()
            logger.warning(
                "The near cache is off for %g s: in %.0f s this process heard of %d changes of "
                "sessions, and was spared %d reads. With so many writes for its number of "
                "processes this application is better off without SESSION_NEAR_CACHE.",
                _PAUSE,
                span,
                heard,
                hits,
            )

    def late(self) -> None:
        """A record was kept, but not proven fresh: log that if it happens often."""
        self._late += 1
        if self._late >= _LATE and not self._said_late and self._late > self.hits:
            self._said_late = True
            logger.warning(
                "SESSION_NEAR_CACHE = %g is too short for this network or machine: %d records "
                "could not be used, since the server's answers came too late to prove that they "
                "were fresh enough. Allow more seconds, or set it to 0.",
                self._bound,
                self._late,
            )


def _size(record: Record) -> int:
    """The bytes of a kept record: its payload, and its decoded form once it was read."""
    return 2 * len(record.payload) + _OVERHEAD
