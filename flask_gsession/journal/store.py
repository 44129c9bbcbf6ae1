"""A wrapper that writes the journal: it records each end before the session is gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from ..errors import Gone, KeyTaken, Stale, StoreUnavailable
from ..stores.base import (
    MAX_POINTERS,
    Clock,
    Deleted,
    Record,
    Replaced,
    Store,
    is_session_key,
    milliseconds,
    too_many_pointers,
)
from ..stores.journals import Journal
from ..stores.parts import Leases, Tidied, Upkeep
from ..stores.support import reason_of_end
from ..stores.wrappers.wrapper import LeasesWrapper, Wrapper
from .entries import BOUND, CREATED, ENDED, EXPIRED, ROTATED, Entry

_RACES = 100  # attempts at one delete, if saves and rotations keep getting in first
_PASSED = 256  # loaded pointers that are remembered for ``_missed``
_SWEPT = 500  # expired sessions per step
_CURSOR = "journal"  # the cursor of a clean-up that has more expired sessions to add


class Subject(NamedTuple):
    """The user of a session. ``previous``: its earlier key, if the roster still has that."""

    owner: str | None = None
    device: str | None = None
    previous: str | None = None


NOBODY = Subject()


class JournalingStore(Wrapper):
    """Writes sessions through the part ``journal`` of ``store``, and other records directly.

    Entries name the session's user, which only the application can read: see ``use``.
    """

    journal: Journal

    def __init__(self, store: Store, journal: Journal, most: int, clock: Clock) -> None:
        super().__init__(store)
        self.journal = journal
        self.path = getattr(store, "path", None)
        self.confirms_logouts = store.confirms_logouts
        self._clock = clock
        self._describe: Callable[[Record], Subject] = lambda record: NOBODY
        self._passed: OrderedDict[str, str] = OrderedDict()
        journal.begin(most)
        self.bulk = None  # each end needs an entry of its own
        if self.leases is not None:
            self.leases = _JournalingLeases(self, self.leases)
        self.upkeep = _JournalingUpkeep(self, self.upkeep)

    def use(self, describe: Callable[[Record], Subject]) -> None:
        """Let ``describe`` return the user of a session. It must not raise."""
        self._describe = describe

    # The verbs.

    def create(self, record: Record) -> None:
        if record.successor is not None or not is_session_key(record.key):
            self.store.create(record)
            return
        whose = self._describe(record)
        entries = [self._entry(CREATED, record.key, whose)]
        if whose.owner is not None:
            entries.append(self._entry(BOUND, record.key, whose))
        try:
            self.journal.create(record, _packed(entries))
        except KeyTaken:
            there = self.store.load(record.key)
            if there is None or self._now() < there.idle_expires_at:
                raise
            self._remove_expired(there)
            self.journal.create(record, _packed(entries))

    def load(self, key: str) -> Record | None:
        record = self.store.load(key)
        if record is not None and record.successor:
            self._passed[record.successor] = key
            if len(self._passed) > _PASSED:
                self._passed.popitem(last=False)
        return record

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        if is_session_key(record.key):
            self.journal.save(record, expected_version, shorten=shorten)
        else:
            super().save(record, expected_version, shorten=shorten)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        if is_session_key(record.key):
            return self.journal.renew(record, idle_expires_at)
        return self.store.renew(record, idle_expires_at)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
    ) -> Replaced | None:
        return self.replace_with_lease(
            key, record, expected_version, pointer, None, shorten=shorten
        )

    def replace_with_lease(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str | None,
        *,
        shorten: bool,
    ) -> Replaced | None:
        """``replace``, under ``lease`` if there is one."""
        whose = self._describe(record)
        before = NOBODY if whose.previous is None else whose
        entries = [*self._missed(key, before), self._rotated(record.key, whose, key)]
        if whose.owner is not None and whose.previous != key:  # a sign-in, not a mere rotation
            entries.append(self._entry(BOUND, record.key, whose))
        packed = _packed(entries)
        return self.journal.replace(
            key, record, expected_version, pointer, packed, lease, shorten=shorten
        )

    def delete(self, key: str, expected_version: int | None = None) -> Deleted | bool:
        if not is_session_key(key):
            return self.store.delete(key, expected_version)
        if expected_version is not None:
            return self.end_version(key, expected_version, None)
        for _ in range(_RACES):
            try:
                return self._delete(key)
            except (Gone, Stale):
                continue  # saved or rotated in between
        raise StoreUnavailable(f"the session changed {_RACES} times before it could be ended")

    def end_version(self, key: str, expected_version: int, lease: str | None) -> Deleted | bool:
        """``delete`` of this version, under ``lease`` if there is one."""
        there = self.store.load(key)
        if there is None or not there.is_live(self._now()):
            raise Gone
        whose = self._describe(there)
        entries = [*self._missed(key, whose), self._ended(key, whose)]
        return self.journal.end(key, expected_version, _packed(entries), lease)

    def _delete(self, key: str) -> Deleted | bool:
        pointers: dict[str, None] = {}
        at = key
        for _ in range(MAX_POINTERS):
            there = self.store.load(at)  # an unreadable record is left to the sweep, too
            if there is None:
                self._remove_pointers(pointers)
                return Deleted(False)
            if self._now() >= there.idle_expires_at:
                return Deleted(False)  # left to the sweep
            if there.successor is None:
                whose = self._describe(there)
                rotated = [entry for each in (*pointers, at) for entry in self._missed(each, whose)]
                entries = [*rotated, self._ended(at, whose)]
                done = self.journal.end(at, there.version, _packed(entries))
                self._remove_pointers(pointers)
                unconfirmed = done.unconfirmed if isinstance(done, Deleted) else ""
                return Deleted(True, there, unconfirmed)
            pointers[at] = None
            at = there.successor
            if at in pointers:
                self._remove_pointers(pointers)
                return Deleted(False)
        raise too_many_pointers()

    def _remove_pointers(self, pointers: dict[str, None]) -> None:
        for pointer in reversed(pointers):
            self.store.delete(pointer)

    def _remove_expired(self, record: Record) -> None:
        if record.successor is None:
            self.journal.expire([(record, self.expired(record).pack())])
        else:
            self.store.delete(record.key)

    # Entries.

    def append_bound(self, key: str, owner: str, device: str) -> None:
        """Record that the session under ``key`` was bound to this user without a rotation."""
        entry = self._entry(BOUND, key, Subject(owner, device))
        self.journal.append(_packed([entry]), key)

    def expired(self, record: Record) -> Entry:
        """The entry for an expired session."""
        whose, end = self._describe(record), record.idle_expires_at
        why = "absolute timeout" if end == record.absolute_expires_at else "idle timeout"
        return Entry(end, EXPIRED, record.key, whose.owner, whose.device, why)

    def sweep(self, limit: int = _SWEPT) -> int:
        """Add expired sessions to the journal, and remove them. Returns how many it found."""
        due = self.journal.due(limit)
        if due:
            self.journal.expire([(record, self.expired(record).pack()) for record in due])
        return len(due)

    def _missed(self, key: str, whose: Subject) -> list[Entry]:
        """The rotation to ``key``, if a pointer led to it and its entry may be missing.

        A store that writes the rotation and its entry in two steps may have crashed in between.
        Then no client has the new token, so every request arrives through the pointer.
        """
        previous = self._passed.pop(key, None)
        if previous is None or not getattr(self.journal, "in_two_steps", False):
            return []
        return [self._rotated(key, whose, previous)]

    def _rotated(self, key: str, whose: Subject, previous: str) -> Entry:
        # The same id each time, since it is also added if it merely may be missing.
        entry = self._entry(ROTATED, key, whose)
        return replace(entry, previous=previous, id=key[:16])

    def _ended(self, key: str, whose: Subject) -> Entry:
        why = reason_of_end()
        by = whose.owner if why.is_own else why.by
        return Entry(self._now(), ENDED, key, whose.owner, whose.device, why.reason, by)

    def _entry(self, kind: str, key: str, whose: Subject) -> Entry:
        return Entry(self._now(), kind, key, whose.owner, whose.device)

    def _now(self) -> int:
        return milliseconds(self._clock)


def _packed(entries: Sequence[Entry]) -> list[bytes]:
    return [entry.pack() for entry in entries]


class _JournalingLeases(LeasesWrapper):
    def __init__(self, store: JournalingStore, leases: Leases) -> None:
        super().__init__(leases)
        self._store = store

    def save(
        self, record: Record, expected_version: int, lease: str, *, shorten: bool = False
    ) -> None:
        if is_session_key(record.key):
            self._store.journal.save(record, expected_version, lease, shorten=shorten)
        else:  # a user's values
            self._leases.save(record, expected_version, lease, shorten=shorten)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str,
        *,
        shorten: bool = False,
    ) -> Replaced | None:
        return self._store.replace_with_lease(
            key, record, expected_version, pointer, lease, shorten=shorten
        )

    def delete(self, key: str, expected_version: int, lease: str) -> Deleted | bool:
        if is_session_key(key):
            return self._store.end_version(key, expected_version, lease)
        return self._leases.delete(key, expected_version, lease)


class _JournalingUpkeep(Upkeep):
    """First moves expired sessions to the journal, then cleans up the rest."""

    def __init__(self, store: JournalingStore, upkeep: Upkeep | None) -> None:
        self._store = store
        self._upkeep = upkeep

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        if cursor in ("", _CURSOR):
            if dry_run:
                found = self._store.journal.figures().due
            else:
                if not cursor:
                    self._store.journal.recover()
                found = self._store.sweep(min(limit, _SWEPT))
            more = bool(found) and not dry_run
            if found or self._upkeep is None:
                rest = _CURSOR if more else ("" if self._upkeep is None else "rest:")
                return Tidied({"expired sessions": found}, found, rest)
        if self._upkeep is None:
            return Tidied({}, 0, "")
        rest = "" if cursor == _CURSOR else cursor.removeprefix("rest:")
        step = self._upkeep.tidy(rest, limit, dry_run=dry_run)
        return step._replace(cursor=f"rest:{step.cursor}" if step.cursor else "")
