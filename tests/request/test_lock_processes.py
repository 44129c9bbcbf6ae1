"""Session locks of processes that are killed, stopped or forked, and of many at once."""

from __future__ import annotations

import mmap
import os
import secrets
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from flask_gsession import LockLost, LockMisused, StoreUnavailable
from flask_gsession.request.lease_renewal import renewer
from flask_gsession.stores import StoreOptions
from flask_gsession.stores.redis import RedisStore
from flask_gsession.stores.redis.pool import Slot
from flask_gsession.testing import FakeClock, HookedStore, a_record
from tests.harness.apps import PATIENCE, Site, Visitor, at_once
from tests.harness.forking import Child, Gate, gates
from tests.harness.servers import RedisServer
from tests.request.test_locks import (
    Waiter,
    a_visitor,
    count,
    count_locked,
    is_free,
    no_thread,
    until,
)

LEASE = 60  # seconds that a lock lasts without its holder


class SharedClock:
    """A `FakeClock` for this process and those that are forked from it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)
        self._memory[:] = struct.pack("d", time.time())

    def __call__(self) -> float:
        (now,) = struct.unpack("d", self._memory[:])
        return float(now)

    def advance(self, seconds: float) -> None:
        """Turn the clock forward, for all."""
        self._memory[:] = struct.pack("d", self() + seconds)


@pytest.fixture(params=["sqlite", "redis", "mongodb"])
def shared_url(request: pytest.FixtureRequest) -> str:
    """A `SESSION_STORE` URL of each kind that several processes can share."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


class Holder:
    """A process that takes the lock, counts, and waits for `go_on` before it leaves the block."""

    def __init__(self, site: Site, visitor: Visitor, entered: Gate, go_on: Gate) -> None:
        self._where = (site.url, site.prefix, site.clock, visitor.cookie)
        self._gates = (entered, go_on)
        self.process = Child(self._hold)
        entered.wait()

    def _hold(self) -> str:
        url, prefix, clock, cookie = self._where
        entered, go_on = self._gates
        result: list[str] = []

        def view(session: Any) -> None:
            try:
                with session.lock(timeout=LEASE):
                    count(session)
                    entered.open()
                    go_on.wait()
            except LockLost:
                result.append("lost")
            else:
                result.append("stored")

        with Site(url, prefix, clock, lock_warn=None) as site:
            site.visitor(cookie).run(view)
        return result[0]

    def kill(self) -> None:
        os.kill(self.process._pid, signal.SIGKILL)
        os.waitpid(self.process._pid, 0)
        os.close(self.process._reader)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        pid = self.process._pid
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


def count_patiently(session: Any) -> int:
    with session.lock(wait=PATIENCE):
        return count(session)


def test_the_lock_of_a_process_that_is_killed(shared_url: str, store_prefix: str) -> None:
    with Site(shared_url, store_prefix, SharedClock()) as site, gates(2) as (entered, go_on):
        visitor = a_visitor(site)
        holder = Holder(site, visitor, entered, go_on)
        holder.kill()
        assert not is_free(site, visitor)
        site.clock.advance(LEASE)
        assert visitor.run(count_patiently) == 1
        assert visitor.run(dict) == {"n": 1}


@pytest.mark.parametrize("somebody", [True, False], ids=["another holds it", "nobody holds it"])
def test_the_lock_of_a_process_that_is_stopped(
    somebody: bool, shared_url: str, store_prefix: str
) -> None:
    with Site(shared_url, store_prefix, SharedClock()) as site, gates(2) as (entered, go_on):
        visitor = a_visitor(site)
        holder = Holder(site, visitor, entered, go_on)
        with holder.stopped():
            site.clock.advance(LEASE)
            if somebody:
                assert visitor.run(count_patiently) == 1
        go_on.open()
        assert holder.process.result() == "lost"
        assert visitor.run(dict) == {"n": int(somebody)}


def test_a_fork_inside_a_lock(shared_url: str, store_prefix: str) -> None:
    """The lock stays with the parent, and the child is one of the others."""
    with Site(shared_url, store_prefix, time.time) as site:
        visitor = a_visitor(site)

        def view(session: Any) -> None:
            def child() -> list[str]:
                with pytest.raises(LockMisused):
                    lock.__exit__(None, None, None)
                assert visitor.another_tab().ask(refused).status_code == 503
                return [str(len(renewer._locks))]

            def refused(other: Any) -> None:
                with other.lock(wait=0.01):
                    raise AssertionError("two have the lock")

            def write() -> str:
                for key in ("n", "other"):  # has changed, has not
                    with pytest.raises(LockMisused):
                        session.update_atomic(key, lambda _: 100)
                return "refused"

            lock = session.lock()
            with lock:
                session["n"] += 1
                assert Child(child).result() == ["0"]
                assert Child(write).result() == "refused"
                assert not is_free(site, visitor)

        visitor.run(view)
        assert visitor.run(dict) == {"n": 1}
        assert is_free(site, visitor)


def test_parent_and_child_count_side_by_side(shared_url: str, store_prefix: str) -> None:
    """Both had waited for locks before, so there is something to inherit wrongly."""
    with Site(shared_url, store_prefix, time.time, lock_wait=PATIENCE) as site:
        visitor = a_visitor(site)

        def work() -> None:
            def client() -> None:
                tab = visitor.another_tab()
                for _ in range(4):
                    tab.run(count_locked)

            at_once(*[client] * 4)

        work()
        child = Child(work)
        work()
        child.result()
        assert visitor.run(dict) == {"n": 48}


# How Redis wakes waiters ------------------------------------------------------------------------


def listening(store: Any) -> bool:
    listener = store._wake_ups._listener
    return listener is not None and listener.ready.is_set()


def wait_once(site: Site) -> Any:
    """Let a request wait for a lock and get it; the store."""
    visitor = a_visitor(site)

    def view(session: Any) -> Waiter:
        with session.lock():
            return Waiter(visitor.another_tab(), count_locked)

    assert visitor.run(view).end() == 200
    return site.store.store


def let_listen(site: Site) -> Any:
    """Have somebody listen to Redis; the store."""
    store: Any = site.store.store
    until(lambda: wait_once(site) is store and listening(store))
    return store


def let_rest(store: Any) -> None:
    """Wait until nobody listens, because nobody waits; the time for that is patched."""
    until(lambda: store._wake_ups._listener is None)


def test_one_connection_serves_all_waiters(
    redis_url: str, store_prefix: str, clock: FakeClock, redis_client: Any
) -> None:
    name = f"locks-{secrets.token_hex(4)}"
    url = f"{redis_url}{'&' if '?' in redis_url else '?'}client_name={name}"

    def listeners() -> int:
        clients = redis_client.client_list()
        return sum(client["name"] == name and client["sub"] != "0" for client in clients)

    with Site(url, store_prefix, clock, lock_wait=PATIENCE) as site:
        visitor = a_visitor(site)
        visitor.run(count_locked)
        assert listeners() == 0  # nobody waited

        def client() -> None:
            visitor.another_tab().run(count_locked)

        at_once(*[client] * 8)
        store = let_listen(site)
        until(lambda: listeners() == 1)
        assert not store._wake_ups._waiters
        store.close()
        until(lambda: listeners() == 0)  # the server sees it a moment later
        let_listen(site)  # and again
    until(lambda: listeners() == 0)


def test_the_next_one_is_called_and_nobody_else(
    redis_url: str, store_prefix: str, clock: FakeClock
) -> None:
    with Site(redis_url, store_prefix, clock) as site:
        store = let_listen(site)
        key = a_record(clock)
        store.create(key)
        for owner in ("one", "two", "three"):
            store.leases.acquire(key.key, owner, 60_000, 10)
        waiters = store._wake_ups._waiters
        store.leases.release(key.key, "one")
        until(lambda: waiters[b"two"].is_set())
        assert not waiters[b"three"].is_set()
        store.leases.release(key.key, "two")
        until(lambda: waiters[b"three"].is_set())
        store.leases.release(key.key, "three")
        assert not waiters


@pytest.mark.parametrize("end", ["delete", "replace"])
def test_the_end_of_a_session_calls_every_waiter(
    end: str, redis_url: str, store_prefix: str, clock: FakeClock
) -> None:
    with Site(redis_url, store_prefix, clock) as site:
        store = let_listen(site)
        record = a_record(clock)
        store.create(record)
        for owner in ("one", "two", "three"):
            store.leases.acquire(record.key, owner, 60_000, 10)
        waiters = dict(store._wake_ups._waiters)
        if end == "delete":
            store.delete(record.key)
        else:
            store.replace(record.key, a_record(clock), record.version, None)
        for owner in ("two", "three"):
            until(waiters[owner.encode()].is_set)
            store.leases.release(record.key, owner)


def test_a_waiter_without_a_call_looks(
    store_prefix: str, own_redis: RedisServer, caplog: pytest.LogCaptureFixture, clock: FakeClock
) -> None:
    """After the connection is lost, until there is a new one."""
    with Site(own_redis.url, store_prefix, clock, lock_wait=PATIENCE) as site:
        client = site.inside.client  # type: ignore[attr-defined]  # of Redis
        store = let_listen(site)
        client.client_kill_filter(_type="pubsub")
        until(lambda: "polling instead" in caplog.text)
        wait_once(site)
        assert not listening(store)
        store._wake_ups._failed_at -= 60
        let_listen(site)


def test_the_thread_that_listens_ends_when_nobody_waits(
    redis_url: str, store_prefix: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_gsession.stores.redis.wakeup._LOOK_AROUND", 0.02)
    with Site(redis_url, store_prefix, clock) as site:
        store: Any = wait_once(site)
        let_rest(store)
        until(lambda: "gsession-wakeup" not in [t.name for t in threading.enumerate()])
        assert wait_once(site) is store


def test_a_wait_outlives_a_silent_channel(
    redis_url: str, store_prefix: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody waits the connection is asked whether it is alive, and answers."""
    monkeypatch.setattr("flask_gsession.stores.redis.wakeup._LOOK_AROUND", 0.02)
    with Site(redis_url, store_prefix, clock) as site:
        store: Any = wait_once(site)
        let_rest(store)
        record = a_record(clock)
        store.create(record)
        for owner in ("one", "two"):
            store.leases.acquire(record.key, owner, 60_000, 10)
        store.leases.wait_for_release(record.key, "two", 0.01)
        until(lambda: listening(store))
        listener = store._wake_ups._listener
        store.leases.wait_for_release(record.key, "two", 0.2)
        assert store._wake_ups._listener is listener
        assert listening(store)
        store.leases.release(record.key, "two")


def test_a_client_that_was_passed_in_can_be_called(
    redis_url: str, store_prefix: str, clock: FakeClock, redis_client: Any
) -> None:
    store = HookedStore(RedisStore(redis_client, StoreOptions(store_prefix, clock=clock)))
    with Site(redis_url, store_prefix, clock, store=store) as site:
        let_listen(site)


def test_a_waiter_looks_if_no_thread_can_listen(
    redis_url: str,
    store_prefix: str,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Site(redis_url, store_prefix, clock, lock_wait=PATIENCE) as site:
        no_thread(monkeypatch, "gsession-wakeup")
        assert not listening(wait_once(site))
    assert "can't start new thread): polling instead" in caplog.text


def test_a_silent_waiter_is_forgotten(
    redis_url: str, store_prefix: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open circuit kept a waiter from leaving the queue: the process stops listening for it."""
    monkeypatch.setattr("flask_gsession.stores.redis.wakeup._LOOK_AROUND", 0.02)
    with Site(redis_url, store_prefix, clock) as site:
        store: Any = wait_once(site)
        let_rest(store)
        record = a_record(clock)
        store.create(record)
        for owner in ("one", "two"):
            store.leases.acquire(record.key, owner, 60_000, 10)
        store.leases.wait_for_release(record.key, "two", 0.01)
        time.sleep(0.1)  # looks around
        assert list(store._wake_ups._waiters) == [b"two"]
        store._wake_ups._waiters[b"two"].kept_until -= 60
        until(lambda: store._wake_ups._listener is None)
        assert not store._wake_ups._waiters


@pytest.mark.parametrize("who", ["holder", "waiter", "nobody"])
def test_the_answer_to_a_release_is_lost(
    who: str,
    redis_url: str,
    store_prefix: str,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The repeat finds nothing to release, as does one whose lock was lost before."""
    with closing(RedisStore(redis_url, StoreOptions(store_prefix, clock=clock))) as store:
        record = a_record(clock)
        store.create(record)
        for owner in ("holder", "waiter"):
            store.leases.acquire(record.key, owner, 60_000, 10)
        ask = Slot.ask

        def lose(slot: Slot, request: bytes) -> Any:
            ask(slot, request)
            monkeypatch.setattr(Slot, "ask", ask)
            raise RedisConnectionError("by the test")

        monkeypatch.setattr(Slot, "ask", lose)
        with pytest.raises(StoreUnavailable):
            store.leases.release(record.key, who)
        assert store.leases.release(record.key, who) is False
