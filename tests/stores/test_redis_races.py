"""Redis connections while another thread closes the pool, or the server is replaced."""

from __future__ import annotations

import time
from typing import Any

import pytest

from flask_gsession.errors import StoreUnavailable
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.redis import wakeup
from flask_gsession.stores.redis.pool import AllInUse, ConnectionPool, _Lent
from flask_gsession.stores.redis.servers import PrimaryPool
from tests.harness.interleaving import before_line


class NoConnection:
    def __init__(self) -> None:
        self.deadline = type("Deadline", (), {"at": 0.0})()
        self.open = True
        self._sock = None

    def disconnect(self) -> None:
        self.open = False


@pytest.fixture
def pool() -> ConnectionPool:
    return ConnectionPool(NoConnection, 2)


def soon() -> float:
    return time.monotonic() + 0.05


def test_a_connection_that_is_returned_while_the_pool_is_closed_is_not_lent(
    pool: ConnectionPool,
) -> None:
    """It may lead to a server that was replaced, whose records would count as current."""
    slot = pool.take(soon())
    connection = slot.connection
    with before_line(ConnectionPool.give, "idle.append(slot)", pool.close):
        pool.give(slot)
    del slot
    lent = [pool.take(soon()) for _ in range(2)]
    assert {slot.connection for slot in lent}.isdisjoint({connection})
    with pytest.raises(AllInUse):
        pool.take(soon())


def test_a_lost_slot_is_not_made_up_for_in_the_next_pool(pool: ConnectionPool) -> None:
    lent = [pool.take(soon()), pool.take(soon())]
    del lent[0]
    with before_line(ConnectionPool._wait_until_closed, "made = Slot(returned)", pool.close):
        extra = pool.take(soon())
    lent = [pool.take(soon()), pool.take(soon())]
    pool.give(extra)
    del extra
    with pytest.raises(AllInUse):
        pool.take(soon())


def test_a_pool_that_two_threads_close_keeps_its_connections_afterwards(
    pool: ConnectionPool,
) -> None:
    with before_line(_Lent.__init__, "self.slots", pool.close):
        pool.close()
    for _ in range(3):
        lent = [pool.take(soon()) for _ in range(2)]
        for slot in lent:
            pool.give(slot)
    del lent, slot
    lent = [pool.take(soon()) for _ in range(2)]
    with pytest.raises(AllInUse):
        pool.take(soon())
    assert all(slot.connection.open for slot in lent)


def test_a_connection_that_was_lent_during_a_failover_is_not_lent_again() -> None:
    """The old primary still accepts writes for a while, and they are lost."""
    primary = ["old", 1]
    pool: Any = PrimaryPool("redis+sentinel://127.0.0.1:1/main/0", 1.0, 2)
    pool.make = NoConnection
    pool._find = lambda _: tuple(primary)
    pool._pooled = pool._find(0)
    first, second = pool.take(soon()), pool.take(soon())
    connection = first.connection
    pool.give(second)
    primary[0] = "new"
    pool._look_at = 0.0
    pool.give(pool.take(soon()))
    pool.give(first)
    assert not connection.open
    assert pool.take(soon()).connection is not connection


def test_a_lock_is_not_waited_for_on_a_connection_that_just_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(wakeup._Waiter, "wait", lambda self, seconds: waited.append(seconds))
    wake_ups: Any = wakeup.WakeUps(NoConnection, b"", 0.1)
    ended = wake_ups._listener = wakeup._Listener(wake_ups)
    ended.ready.set()

    def end() -> None:
        ended.ready.clear()
        wake_ups._gone(ended, None)

    with before_line(wakeup.WakeUps.wait, "waiter = self._expect(", end):
        wake_ups._failed_at = time.monotonic()  # it doesn't connect again so soon
        assert not wake_ups.wait(b"owner", 60.0)
    assert waited == []


def test_a_server_that_ends_before_it_is_followed_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[bool] = []

    def refuse(_: object) -> None:
        raise OSError("not connected")

    store: Any = open_store("redis://127.0.0.1:1/0", StoreOptions())[0]
    source = store.changes.source
    lost = type("Lost", (), {"close": lambda _: closed.append(True)})()
    monkeypatch.setattr(source, "_connect", lambda *_: lost)
    monkeypatch.setattr(store.commands.pool, "follow", refuse)
    with pytest.raises(StoreUnavailable, match="not connected"):
        source.open("")
    assert closed
    store.close()
