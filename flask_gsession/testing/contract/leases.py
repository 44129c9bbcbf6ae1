"""The contract of the part ``leases``."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import Gone, LeaseLost, QueueFull, Stale
from ...stores.base import (
    Record,
    Store,
    new_version,
)
from ...stores.lease import ASK_AGAIN, WAITER_LIFE
from ...stores.parts import parts_of
from ..clock import FakeClock
from ..records import a_pointer, a_record
from .base import Contract, changed, live, raises


class LeaseContract(Contract):
    @contextmanager
    def _leasing(self) -> Iterator[tuple[Store, Any, FakeClock, Record]]:
        """A store, its part ``leases`` (None if it lacks it) and a stored record."""
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            yield store, parts_of(store).leases, clock, record

    def test_a_lease_has_one_holder(self) -> None:
        with self._leasing() as (_, leases, _, record):
            if leases is None:
                return
            assert leases.acquire(record.key, "one", 10_000, 10) == 0
            assert 0 < leases.acquire(record.key, "two", 10_000, 10) <= ASK_AGAIN
            assert leases.release(record.key, "one") is True
            assert leases.acquire(record.key, "two", 10_000, 10) == 0

    def test_acquire_may_be_repeated(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            assert leases.acquire(record.key, "one", 10_000, 10) == 0
            assert leases.acquire(record.key, "two", 10_000, 1) > 0
            clock.advance(1)
            assert leases.acquire(record.key, "two", 10_000, 1) > 0
            assert leases.acquire(record.key, "one", 10_000, 10) == 0

    def test_a_repeat_takes_no_lease_from_another_owner(self) -> None:
        with self._leasing() as (store, leases, _, record):
            if leases is None:
                return
            key = record.key
            leases.acquire(key, "one", 10_000, 10)
            leases.extend(key, "one", 10_000)
            leases.release(key, "one")
            assert leases.acquire(key, "two", 10_000, 10) == 0
            assert leases.acquire(key, "one", 10_000, 10) > 0
            assert leases.extend(key, "one", 10_000) is False
            assert leases.release(key, "one") is False
            assert leases.extend(key, "two", 10_000) is True
            store.delete(key)
            with raises(Gone):
                leases.acquire(key, "two", 10_000, 10)
            assert leases.extend(key, "two", 10_000) is False
            assert leases.release(key, "two") is False
            assert store.load(key) is None

    def test_a_lease_runs_out(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            assert leases.acquire(record.key, "one", 500, 10) == 0
            assert leases.acquire(record.key, "two", 500, 10) == 500
            clock.advance(0.5)
            assert leases.acquire(record.key, "two", 500, 10) == 0
            assert leases.release(record.key, "one") is False
            assert leases.extend(record.key, "two", 500) is True

    def test_extend_lets_a_lease_run_longer(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 5000, 10)
            assert leases.extend(record.key, "two", 5000) is False
            clock.advance(4)
            assert leases.extend(record.key, "one", 5000) is True
            clock.advance(4)
            assert leases.acquire(record.key, "two", 5000, 10) > 0
            clock.advance(1)
            assert leases.extend(record.key, "one", 5000) is False
            assert leases.acquire(record.key, "two", 5000, 10) == 0

    def test_a_lease_ends_after_a_clock_was_set_back(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 5000, 10)
            leases.acquire(record.key, "gone", 5000, 10)
            clock.advance(-4)  # another host's clock; this must not free a lease
            assert leases.acquire(record.key, "two", 5000, 10) > 0
            clock.advance(-3600)
            assert leases.extend(record.key, "one", 5000) is True  # no other owner took it
            clock.advance(-3600)
            assert leases.acquire(record.key, "three", 5000, 10) == 0
            with raises(LeaseLost):
                leases.save(changed(record), record.version, "one")
            leases.release(record.key, "three")

    def test_extend_counts_from_now(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 500, 10)
            assert leases.extend(record.key, "one", 60_000) is True
            assert leases.acquire(record.key, "two", 500, 10) > 0
            assert leases.extend(record.key, "one", 500) is True
            clock.advance(-5)
            assert leases.acquire(record.key, "three", 500, 10) == 0

    def test_only_the_holder_releases_and_once(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            assert leases.release(record.key, "one") is False
            leases.acquire(record.key, "one", 5000, 10)
            assert leases.release(record.key, "two") is False
            assert leases.acquire(record.key, "two", 5000, 1) > 0
            assert leases.release(record.key, "one") is True
            assert leases.release(record.key, "one") is False
            assert leases.acquire(record.key, "two", 5000, 10) == 0
            clock.advance(5)
            assert leases.release(record.key, "two") is False

    def test_waiters_take_turns(self) -> None:
        with self._leasing() as (_, leases, _, record):
            if leases is None:
                return
            for owner in ("one", "two", "three", "two"):
                leases.acquire(record.key, owner, 5000, 10)
            leases.release(record.key, "one")
            assert leases.acquire(record.key, "three", 5000, 10) > 0
            assert leases.acquire(record.key, "new", 5000, 10) > 0
            assert leases.acquire(record.key, "two", 5000, 10) == 0
            leases.release(record.key, "two")
            assert leases.acquire(record.key, "new", 5000, 10) > 0
            assert leases.acquire(record.key, "three", 5000, 10) == 0

    def test_a_silent_waiter_loses_its_place(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            for owner in ("one", "two", "three"):
                leases.acquire(record.key, owner, 60_000, 10)
            clock.advance(WAITER_LIFE / 1000 - 0.5)
            leases.acquire(record.key, "three", 60_000, 10)
            leases.release(record.key, "one")
            assert leases.acquire(record.key, "three", 60_000, 10) == 500
            clock.advance(0.5)
            assert leases.acquire(record.key, "three", 60_000, 10) == 0
            assert leases.acquire(record.key, "two", 60_000, 10) > 0

    def test_a_full_queue_refuses(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 60_000, 0)
            with raises(QueueFull):
                leases.acquire(record.key, "two", 60_000, 0)
            for owner in ("two", "three", "three"):
                assert leases.acquire(record.key, owner, 60_000, 2) > 0
            with raises(QueueFull):
                leases.acquire(record.key, "four", 60_000, 2)
            leases.release(record.key, "two")
            assert leases.acquire(record.key, "four", 60_000, 2) > 0
            clock.advance(WAITER_LIFE / 1000)
            assert leases.acquire(record.key, "five", 60_000, 2) > 0

    def test_a_lease_needs_a_live_session(self) -> None:
        with self._leasing() as (store, leases, clock, record):
            if leases is None:
                return
            old, new, short = a_record(clock), a_record(clock), a_record(clock, idle=10)
            with raises(Gone):
                leases.acquire(old.key, "one", 5000, 10)
            store.create(old)
            store.create(short)
            assert leases.acquire(short.key, "one", 60_000, 10) == 0
            store.replace(old.key, new, old.version, a_pointer(old, new))
            with raises(Gone):
                leases.acquire(old.key, "one", 5000, 10)
            clock.advance(10)
            with raises(Gone):
                leases.acquire(short.key, "two", 5000, 10)
            with raises(Gone):
                leases.save(changed(short), short.version, "one")
            assert live(store, clock, short) is None
            store.delete(new.key)
            leases.extend(record.key, "one", 5000)
            with raises(Gone):
                leases.acquire(new.key, "one", 5000, 10)
            assert live(store, clock, new) is None

    def test_a_lease_ends_with_its_session(self) -> None:
        with self._leasing() as (store, leases, clock, record):
            if leases is None:
                return
            old, new = a_record(clock), a_record(clock)
            store.create(old)
            leases.acquire(old.key, "one", 5000, 10)
            store.replace(old.key, new, old.version, a_pointer(old, new))
            assert not leases.extend(old.key, "one", 5000)
            assert not leases.release(old.key, "one")
            assert leases.acquire(new.key, "two", 5000, 10) == 0
            leases.acquire(record.key, "one", 5000, 10)
            leases.acquire(record.key, "two", 5000, 10)
            store.delete(record.key)
            assert not leases.extend(record.key, "one", 5000)
            store.create(record)
            assert leases.acquire(record.key, "three", 5000, 10) == 0

    def test_a_write_under_the_lease(self) -> None:
        with self._leasing() as (store, leases, clock, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 5000, 10)
            saved = changed(record)
            leases.save(saved, record.version, "one")
            leases.save(saved, record.version, "one")
            assert store.load(record.key) == saved
            with raises(Stale):
                leases.save(changed(record), record.version, "one")
            new = a_record(clock)
            leases.replace(record.key, new, saved.version, None, "one")
            leases.replace(record.key, new, saved.version, None, "one")
            assert store.load(new.key) == new
            leases.acquire(new.key, "one", 5000, 10)
            assert leases.delete(new.key, new.version, "one")

    def test_a_write_needs_the_lease_that_it_names(self) -> None:
        with self._leasing() as (store, leases, clock, record):
            if leases is None:
                return

            def refused() -> None:
                new = a_record(clock)
                with raises(LeaseLost):
                    leases.save(changed(record), record.version, "one")
                with raises(LeaseLost):
                    leases.save(changed(record), new_version(), "one")
                with raises(LeaseLost):
                    leases.replace(record.key, new, record.version, a_pointer(record, new), "one")
                with raises(LeaseLost):
                    leases.replace(record.key, new, record.version, None, "one")
                with raises(LeaseLost):
                    leases.delete(record.key, record.version, "one")
                assert store.load(record.key) == record
                assert store.load(new.key) is None

            refused()  # never acquired
            leases.acquire(record.key, "one", 5000, 10)
            clock.advance(5)
            refused()  # expired, and no other owner has it
            leases.acquire(record.key, "two", 5000, 10)
            refused()
            leases.acquire(record.key, "one", 5000, 10)
            refused()  # waiting is not holding
            leases.release(record.key, "two")
            refused()
            leases.acquire(record.key, "one", 5000, 10)
            leases.release(record.key, "one")
            refused()
            with raises(Gone):
                leases.save(changed(a_record(clock)), record.version, "one")

    def test_a_stored_write_is_recognised_after_its_lease(self) -> None:
        with self._leasing() as (store, leases, clock, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 5000, 10)
            saved = changed(record)
            leases.save(saved, record.version, "one")
            clock.advance(5)
            leases.save(saved, record.version, "one")
            assert store.load(record.key) == saved

    def test_a_write_without_a_lease_ignores_leases(self) -> None:
        with self._leasing() as (store, leases, _, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 5000, 10)
            saved = changed(record)
            store.save(saved, record.version)
            assert store.renew(saved, saved.idle_expires_at + 1000)
            leases.save(changed(saved), saved.version, "one")
            assert store.delete(record.key)

    def test_a_wait_ends_with_the_release(self) -> None:
        with self._leasing() as (_, leases, _, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 60_000, 10)
            for _ in range(2):  # the first wait may need to set up a connection
                assert leases.acquire(record.key, "two", 60_000, 10) > 0
                leases.wait_for_release(record.key, "two", 0.01)
            done: list[float] = []

            def wait() -> None:
                end = time.monotonic() + 30
                while time.monotonic() < end:
                    leases.wait_for_release(record.key, "two", end - time.monotonic())
                    if leases.acquire(record.key, "two", 60_000, 10) == 0:
                        done.append(time.monotonic())
                        return

            waiter = threading.Thread(target=wait)
            waiter.start()
            time.sleep(0.05)
            assert not done
            released = time.monotonic()
            leases.release(record.key, "one")
            waiter.join()
            assert done[0] - released < 20

    def test_one_of_parallel_acquisitions_wins(self) -> None:
        with self._leasing() as (_, leases, _, record):
            if leases is None:
                return
            start = threading.Barrier(8)
            answers: list[int] = []

            def acquire(number: int) -> None:
                start.wait()
                answers.append(leases.acquire(record.key, f"owner{number}", 60_000, 10))

            threads = [threading.Thread(target=acquire, args=(n,)) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert answers.count(0) == 1
