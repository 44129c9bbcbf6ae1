"""The contract of the part ``journal``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import Gone, KeyTaken, Stale
from ...stores.base import Store
from ...stores.journals import Journal
from ...stores.parts import parts_of
from ..clock import FakeClock
from ..records import a_pointer, a_record
from .base import Contract, changed, clean_up, live, raises

_MOST = 1000


def entries_of(journal: Journal, after: int = 0) -> list[bytes]:
    """All entries after this number. Checks that their numbers are consecutive."""
    found: list[bytes] = []
    journal.recover()
    while True:
        entries, first = journal.read(after, 7)
        if not entries:
            return found
        assert entries[0][0] == max(first, after + 1)
        for number, entry in entries:
            assert not found or number == after + 1
            after = number
            found.append(entry)


def sweep(journal: Journal, limit: int = 100) -> list[str]:
    """Add all expired sessions to the journal. Returns their keys."""
    keys = []
    while due := journal.due(limit):
        assert journal.expire([(record, record.key.encode()) for record in due]) == len(due)
        keys += [record.key for record in due]
    return keys


class JournalContract(Contract):
    @contextmanager
    def _journal(self) -> Iterator[tuple[Store, Journal, FakeClock, int]]:
        """The store, its journal, the clock, and the last number before the test."""
        with self._store() as (store, clock):
            journal = parts_of(store).journal
            if journal is not None:
                journal.begin(_MOST)
                yield store, journal, clock, journal.figures().last
            else:
                yield store, None, clock, 0  # type: ignore[misc]  # the tests check for None

    def test_each_write_adds_its_entries(self) -> None:
        with self._journal() as (store, journal, clock, start):
            if journal is None:
                return
            record = a_record(clock)
            journal.create(record, [b"created", b"bound"])
            journal.create(record, [])  # a repeat
            saved = changed(record)
            journal.save(saved, record.version)
            assert journal.renew(saved, saved.idle_expires_at + 1000)
            new = a_record(clock, idle=90)
            pointer = a_pointer(saved, new)
            journal.replace(saved.key, new, saved.version, pointer, [b"rotated"])
            assert live(store, clock, new) == new
            assert store.load(saved.key) == pointer
            clock.advance(-5)  # like another server whose clock is behind
            assert journal.end(new.key, new.version, [b"ended"])
            assert live(store, clock, new) is None
            assert entries_of(journal, start) == [b"created", b"bound", b"rotated", b"ended"]

    def test_a_rotation_may_be_repeated_after_a_sweep(self) -> None:
        with self._journal() as (store, journal, clock, start):
            if journal is None:
                return
            record, new = a_record(clock), a_record(clock, idle=90)
            journal.create(record, [])
            journal.replace(record.key, new, record.version, None, [b"rotated"])
            assert entries_of(journal, start) == [b"rotated"]
            journal.replace(record.key, new, record.version, None, [b"rotated"])
            assert live(store, clock, new) == new
            assert {*entries_of(journal, start)} == {b"rotated"}

    def test_the_key_of_an_ended_session_is_free(self) -> None:
        with self._journal() as (store, journal, clock, start):
            if journal is None:
                return
            record = a_record(clock)
            journal.create(record, [b"created"])
            journal.end(record.key, record.version, [b"ended"])
            again = changed(record)
            journal.create(again, [b"imported"])
            assert live(store, clock, again) == again
            assert entries_of(journal, start) == [b"created", b"ended", b"imported"]

    def test_a_refused_write_adds_no_entry(self) -> None:
        with self._journal() as (_, journal, clock, start):
            if journal is None:
                return
            record, other = a_record(clock), a_record(clock)
            journal.create(record, [b"created"])
            with raises(KeyTaken):
                journal.create(changed(record), [b"no"])
            with raises(Stale):
                journal.save(changed(record), 1)
            with raises(Stale):
                journal.end(record.key, 1, [b"no"])
            with raises(Stale):
                journal.replace(record.key, other, 1, None, [b"no"])
            with raises(Gone):
                journal.end(other.key, 1, [b"no"])
            with raises(Gone):
                journal.replace(other.key, a_record(clock), 1, None, [b"no"])
            assert entries_of(journal, start) == [b"created"]

    def test_an_expired_session_stays_until_its_entry_is_added(self) -> None:
        with self._journal() as (store, journal, clock, start):
            if journal is None:
                return
            short, long = a_record(clock, idle=10), a_record(clock)
            renewed, old, new = a_record(clock, idle=10), a_record(clock), a_record(clock, idle=20)
            for record in (short, long, renewed, old):
                journal.create(record, [])
            journal.renew(renewed, renewed.idle_expires_at + 40_000)
            journal.replace(old.key, new, old.version, a_pointer(old, new), [], shorten=True)
            clock.advance(15)
            upkeep = parts_of(store).upkeep
            if upkeep is not None:
                clean_up(upkeep, dry_run=False)
            for _ in range(3):  # some stores remove expired records here
                store.create(a_record(clock))
            with raises(KeyTaken):
                journal.create(changed(short), [b"no"])
            assert live(store, clock, short) is None
            assert sweep(journal) == [short.key]
            assert sweep(journal) == []
            clock.advance(10)
            assert sweep(journal) == [new.key]
            assert {*sweep(journal, 1)} == set()
            expected = [short.key.encode(), new.key.encode()]
            assert entries_of(journal, start) == expected
            assert live(store, clock, long) == long
            assert store.load(short.key) is None

    def test_a_session_that_was_renewed_is_not_expired(self) -> None:
        with self._journal() as (store, journal, clock, start):
            if journal is None:
                return
            record, ended = a_record(clock, idle=10), a_record(clock, idle=10)
            journal.create(record, [])
            journal.create(ended, [])
            journal.end(ended.key, ended.version, [b"ended"])
            as_of_then = [(record, b"no"), (ended, b"no")]
            assert journal.expire(as_of_then) == 0  # not yet
            journal.renew(record, record.idle_expires_at + 50_000)
            clock.advance(10)
            assert journal.expire(as_of_then) == 0
            assert live(store, clock, record) is not None
            assert journal.due(10) == []
            assert entries_of(journal, start) == [b"ended"]

    def test_sessions_stored_without_a_journal_are_picked_up(self) -> None:
        with self._journal() as (store, journal, clock, start):
            if journal is None:
                return
            saved, renewed = a_record(clock), a_record(clock)
            store.create(saved)
            store.create(renewed)
            journal.save(changed(saved), saved.version)
            journal.renew(renewed, renewed.idle_expires_at + 1)
            clock.advance(61)
            assert sorted(sweep(journal)) == sorted([saved.key, renewed.key])
            assert len(entries_of(journal, start)) == 2

    def test_writes_check_their_lease(self) -> None:
        with self._journal() as (store, journal, clock, start):
            leases = parts_of(store).leases
            if journal is None or leases is None:
                return
            record = a_record(clock)
            journal.create(record, [])
            assert leases.acquire(record.key, "one", 60_000, 0) == 0
            saved = changed(record)
            journal.save(saved, record.version, "one")
            new = a_record(clock)
            journal.replace(saved.key, new, saved.version, None, [b"rotated"], "one")
            assert leases.acquire(new.key, "two", 60_000, 0) == 0
            journal.end(new.key, new.version, [b"ended"], "two")
            assert entries_of(journal, start) == [b"rotated", b"ended"]

    def test_consumers_acknowledge(self) -> None:
        with self._journal() as (_, journal, _, start):
            if journal is None:
                return
            name = f"siem-{start}"
            assert journal.acknowledged(name) is None
            journal.append([b"%d" % number for number in range(10)])
            assert entries_of(journal, start) == [b"%d" % number for number in range(10)]
            last = journal.figures().last
            (numbered, _) = journal.read(start, 3)
            journal.acknowledge(name, numbered[-1][0])
            journal.acknowledge(name, numbered[0][0])  # late: never moves back
            assert journal.acknowledged(name) == last - 7
            assert journal.figures().consumers[name] == last - 7
            assert journal.forget(name)
            assert not journal.forget(name)
            assert journal.acknowledged(name) is None

    def test_retention_is_bounded(self) -> None:
        with self._journal() as (_, journal, _, start):
            if journal is None:
                return
            for first in range(0, 2 * _MOST, 100):
                journal.append([b"%d" % number for number in range(first, first + 100)])
            figures = journal.figures()
            assert _MOST <= figures.last - figures.first + 1 <= _MOST + 250
            (number, _), *_ = journal.read(start, 1).entries
            assert number == figures.first
            assert journal.read(start, 1).first == figures.first
