"""The circuit breaker: a store that costs every call its time is left alone for a moment."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flask_gsession.errors import Gone, Stale, StoreUnavailable, UnreadableRecord
from flask_gsession.events import CircuitClosed, CircuitOpened, Event, Events
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.support import ending_by
from flask_gsession.stores.wrappers.breaker import Circuit, GuardedStore
from flask_gsession.testing import FakeClock, HookedStore, a_record
from tests.harness.apps import Site, SiteMaker, until, within
from tests.harness.forking import Child
from tests.harness.servers import MongoServer, RedisServer, with_database

FAILURES = 3
PAUSE = 1.0
TIMEOUT = 1.0
LONG = PAUSE * 1.1  # the pause with the most of its jitter
RECORD = a_record(time.time)


class Drill(HookedStore):
    """A guarded store in memory that fails on demand, on a clock of its own."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.clock = FakeClock(0)
        self.happened: list[Event] = []
        events = Events()
        events.subscribe(Event, self.happened.append)
        self.guarded = GuardedStore(self, FAILURES, PAUSE, TIMEOUT, events)
        for circuit in (self.guarded.loads, self.guarded.writes):
            circuit.clock = self.clock

    def will(self, operation: str, error: Exception | None, seconds: float = TIMEOUT) -> None:
        """Let the next call take so long, and then raise the error."""

        def hook() -> None:
            self.clock.advance(seconds)
            if error is not None:
                raise error

        self.before(operation, hook)

    def fail(self, times: int = 1, operation: str = "load") -> None:
        """Let so many calls fail slowly."""
        for _ in range(times):
            self.will(operation, StoreUnavailable("drill"))
            with pytest.raises(StoreUnavailable, match=r"^drill$"):
                self.act(operation)

    def act(self, operation: str = "load") -> object:
        """Call an operation through the breaker."""
        arguments: dict[str, tuple[Any, ...]] = {
            "load": (RECORD.key,),
            "create": (a_record(time.time),),
            "save": (RECORD, 1),
            "renew": (RECORD, 1),
            "replace": (RECORD.key, RECORD, 1, None),
            "delete": (RECORD.key,),
        }
        answer: object = getattr(self.guarded, operation)(*arguments[operation])
        return answer

    def refused(self, operation: str = "load") -> StoreUnavailable:
        """The error of a call that must not reach the store."""
        calls = len(self.calls)
        with pytest.raises(StoreUnavailable) as caught:
            self.act(operation)
        assert len(self.calls) == calls
        return caught.value


@pytest.fixture
def drill() -> Drill:
    return Drill()


def test_slow_failures_in_a_row_open_it(drill: Drill, caplog: pytest.LogCaptureFixture) -> None:
    drill.fail(FAILURES)
    drill.clock.advance(PAUSE / 2)
    error = drill.refused()
    assert error.detail == "not asked: loads have failed for 0.5 s, the last one with: drill"
    assert dict(error.get_headers())["Retry-After"] == "1"
    assert drill.happened == [CircuitOpened("loads", "drill")]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_an_answer_between_failures_is_a_new_start(drill: Drill) -> None:
    for _ in range(5):
        drill.fail(FAILURES - 1)
        drill.act()
    assert drill.happened == []


@pytest.mark.parametrize("error", [Gone(), Stale(), UnreadableRecord("corrupt")], ids=repr)
def test_no_is_an_answer_too(error: Exception, drill: Drill) -> None:
    for _ in range(5):
        drill.fail(FAILURES - 1, "save")
        drill.will("save", error)
        with pytest.raises(type(error)):
            drill.act("save")
    for _ in range(2 * FAILURES):
        drill.will("save", error)
        with pytest.raises(type(error)):
            drill.act("save")
    assert drill.happened == []


def test_fast_failures_and_contention_do_not_count(drill: Drill) -> None:
    for _ in range(2 * FAILURES):
        drill.will("load", StoreUnavailable("out of memory"), seconds=0.01)
        drill.will("load", StoreUnavailable("locked", contention=True))
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                drill.act()
    drill.fail(FAILURES - 1)
    drill.will("load", StoreUnavailable("locked", contention=True))
    with pytest.raises(StoreUnavailable, match="locked"):
        drill.act()
    drill.fail()
    assert drill.happened == [CircuitOpened("loads", "drill")]  # they don't interrupt a run either


def test_loads_and_writes_have_one_each(drill: Drill) -> None:
    writes = ["create", "save", "renew", "replace", "delete"]
    for operation in writes[:FAILURES]:
        drill.act()
        drill.fail(1, operation)
    for operation in writes:
        drill.refused(operation)
    assert drill.act() is None
    drill.fail(FAILURES)
    drill.refused()
    assert drill.happened == [CircuitOpened("writes", "drill"), CircuitOpened("loads", "drill")]


def test_one_call_at_a_time_looks_whether_it_is_over(drill: Drill) -> None:
    drill.fail(FAILURES)
    for _ in range(3):
        drill.clock.advance(LONG)
        drill.fail()
        drill.refused()
    drill.clock.advance(LONG)
    seen: list[StoreUnavailable] = []
    drill.before("load", lambda: seen.append(drill.refused()))  # while the probe is on its way
    assert drill.act() is None
    assert len(seen) == 1
    assert drill.act() is None
    opened, closed = drill.happened
    assert isinstance(opened, CircuitOpened)
    assert closed == CircuitClosed("loads", pytest.approx(3 * (LONG + TIMEOUT) + LONG))
    drill.fail(FAILURES)
    drill.refused()


@pytest.mark.parametrize("error", [Gone(), StoreUnavailable("out of memory")], ids=repr)
def test_a_store_that_answers_is_asked_again(error: Exception, drill: Drill) -> None:
    drill.fail(FAILURES, "delete")
    drill.clock.advance(LONG)
    drill.will("delete", error, seconds=0)
    with pytest.raises(type(error)):
        drill.act("delete")
    assert not drill.act("delete")


def test_a_probe_in_contention_proves_nothing(drill: Drill) -> None:
    drill.fail(FAILURES)
    drill.clock.advance(LONG)
    drill.will("load", StoreUnavailable("locked", contention=True))
    with pytest.raises(StoreUnavailable, match="locked"):
        drill.act()
    drill.refused()
    drill.clock.advance(LONG)
    assert drill.act() is None


def test_a_probe_that_never_returns_is_abandoned(drill: Drill) -> None:
    drill.fail(FAILURES)
    drill.clock.advance(LONG)
    drill.will("load", KeyboardInterrupt())  # type: ignore[arg-type]  # not an Exception
    with pytest.raises(KeyboardInterrupt):
        drill.act()
    drill.refused()
    drill.clock.advance(2 * TIMEOUT + PAUSE)
    assert drill.act() is None


def test_calls_from_before_the_recovery_do_not_count(drill: Drill) -> None:
    def be_overtaken(depth: int) -> None:
        if depth:
            drill.before("load", lambda: be_overtaken(depth - 1))
            with pytest.raises(StoreUnavailable, match=r"^late$"):
                drill.act()
        else:
            drill.fail(FAILURES)
            drill.clock.advance(LONG)
            drill.act()
        raise StoreUnavailable("late")

    with pytest.raises(StoreUnavailable, match=r"^late$"):
        be_overtaken(2 * FAILURES)
    drill.act()
    assert [type(event) for event in drill.happened] == [CircuitOpened, CircuitClosed]


def test_five_hundred_threads_at_once() -> None:
    """All that are in it lose their time once; afterwards one asks, and 499 do not wait."""
    drill = Drill()
    frozen = threading.Event()
    outcomes: list[str] = []

    def load() -> None:
        try:
            drill.act()
            outcomes.append("loaded")
        except StoreUnavailable as error:
            outcomes.append(error.detail.partition(":")[0])

    def all_at_once(before: Callable[[], object]) -> None:
        for _ in range(500):
            drill.before("load", before)
        threads = [threading.Thread(target=load) for _ in range(500)]
        for thread in threads:
            thread.start()
        if not frozen.is_set():
            while drill.calls.count("load") < 500:
                time.sleep(0.01)
            drill.clock.advance(TIMEOUT)
            frozen.set()
        for thread in threads:
            thread.join()

    def time_out() -> None:
        frozen.wait()
        raise StoreUnavailable("timed out")

    all_at_once(time_out)
    assert outcomes == ["timed out"] * 500
    assert [type(event) for event in drill.happened] == [CircuitOpened]
    outcomes.clear()
    drill._hooks.clear()
    drill.clock.advance(LONG)
    all_at_once(time_out_slowly(drill))
    assert sorted(outcomes) == ["not asked"] * 499 + ["timed out"]
    assert [type(event) for event in drill.happened] == [CircuitOpened]


def time_out_slowly(drill: Drill) -> Callable[[], None]:
    def hook() -> None:
        deadline = time.monotonic() + 1
        while drill.calls.count("load") < 1000 and time.monotonic() < deadline:
            time.sleep(0.01)  # nobody else comes
        raise StoreUnavailable("timed out", contention=True)

    return hook


def test_a_forked_process_starts_with_a_closed_one(drill: Drill) -> None:
    drill.fail(FAILURES)
    with drill.guarded.loads._lock:  # as another thread may have it at that moment
        child = Child(lambda: drill.act())
    assert child.result() is None
    drill.refused()


# In an application -----------------------------------------------------------------------------


def circuits_of(site: Site) -> list[Circuit]:
    store: GuardedStore = site.app.extensions["gsession"][site.ext].repository.store
    return [store.loads, store.writes]


def test_the_application_has_it_by_default(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    def slow() -> None:
        clock.advance(0.06)
        raise StoreUnavailable("slow")

    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    assert site.ext.store(site.app) is site.store
    clock = FakeClock(0)
    for circuit in circuits_of(site):
        circuit.clock = clock
    for _ in range(6):
        site.store.before("load", slow)
    with site.counted() as count, caplog.at_level(logging.INFO, "flask_gsession"):
        for _ in range(6):
            assert visitor.ask(dict).status_code == 503
    assert count.calls == ["load"] * 5
    told = [record for record in caplog.records if record.name == "flask_gsession"]
    assert [record.levelname for record in told] == ["ERROR"] * 6 + ["INFO"]
    assert "until it answers, loads fail at once" in told[4].getMessage()
    assert "not asked" in told[6].getMessage()
    assert [event.operations for event in site.happened(CircuitOpened)] == ["loads"]


def test_it_can_be_switched_off(make_site: Callable[..., Site]) -> None:
    site = make_site(breaker_failures=0)
    repository: Any = site.app.extensions["gsession"][site.ext].repository
    assert repository.store is site.store


def test_a_caller_in_a_hurry_opens_no_circuit_for_the_others() -> None:
    """A service may ask over gRPC with a deadline that a healthy store can't keep."""
    circuit = Circuit("loads", 1, 30, 1.0, Events())
    late = StoreUnavailable("no time left")
    with ending_by(time.monotonic()):
        circuit.failed(late, circuit.clock() - 0.2)
    assert circuit.is_healthy
    with ending_by(time.monotonic()):  # as long as the store's own budget
        circuit.failed(late, circuit.clock() - 0.9)
    assert not circuit.is_healthy


@pytest.fixture(params=["redis", "mongodb"])
def server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("own_redis" if request.param == "redis" else "own_mongo")


def test_a_frozen_server_costs_a_few_requests_their_time(
    server: RedisServer | MongoServer, clock: FakeClock
) -> None:
    url = server.url
    if isinstance(server, MongoServer):
        url = with_database(url, "breaker")
    with SiteMaker(url, "breaker:", clock) as make:
        patient = make()
        visitor = patient.visitor()
        visitor.run(lambda session: session.update(hits=0))
        site = make(timeout=0.2, breaker_failures=3, breaker_pause=30)
        visitors = [site.visitor(visitor.cookie) for _ in range(100)]
        turned = FakeClock(0)
        for circuit in circuits_of(site):
            circuit.clock = lambda: time.monotonic() + turned()

        def is_served() -> bool:
            turned.advance(33)
            return visitors[0].ask(dict).status_code == 200

        def ask_all() -> None:
            for each in visitors:
                response = each.ask(dict)
                assert response.status_code == 503
                assert 20 <= int(response.headers["Retry-After"]) <= 33

        until(is_served)
        with server.paused():
            for each in visitors[:3]:
                assert each.ask(dict).status_code == 503
            within(10 * 0.2, ask_all)  # not 100 times
        until(is_served)
        assert visitors[0].run(dict) == {"hits": 0}
        assert site.happened(CircuitClosed)


def test_a_busy_pool_does_not_open_the_circuit(redis_url: str) -> None:
    store: Any = open_store(redis_url, StoreOptions(timeout=0.06, pool_max=1))[0]
    slot = store.commands.pool.take(time.monotonic() + 10)
    with pytest.raises(StoreUnavailable, match="were in use") as caught:
        store.load("x")
    assert caught.value.contention
    store.commands.pool.give(slot)
    store.close()


def test_a_locked_database_does_not_open_the_circuit(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "sessions.sqlite3"
    with SiteMaker(f"sqlite:///{path}", "", clock) as make:
        site = make(timeout=0.06, breaker_failures=1, breaker_pause=30)
        visitor = make().visitor()
        visitor.run(lambda session: session.update(a=0))
        waiting = site.visitor(visitor.cookie)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(3):
                assert waiting.ask(lambda session: session.update(a=1)).status_code == 503
            other.execute("ROLLBACK")
        assert site.happened(CircuitOpened) == []
        assert visitor.run(dict) == {"a": 0}
