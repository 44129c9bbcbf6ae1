"""Threads and tasks of one request share its session: nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import Counter, UserDict
from collections.abc import Callable, Iterator, KeysView
from contextlib import suppress
from random import Random
from typing import Any

import msgspec
import pytest
from flask import copy_current_request_context
from marshmallow import fields

from flask_gsession import (
    LockMisused,
    Session,
    SessionConflict,
    SessionData,
    StoreUnavailable,
    TransactionMisused,
)
from flask_gsession.interface import GSessionInterface
from flask_gsession.request import lifecycle, ownership, transactions
from flask_gsession.request.blocks import begin_block, leave_block, roll_back
from flask_gsession.request.checks import check_store, in_retried_code
from flask_gsession.request.lifecycle import Lifecycle
from flask_gsession.request.loading import load
from flask_gsession.request.state import NO_WISHES, NOTHING_SEEN, Binding, Outage, Wishes
from flask_gsession.request.tracking import TrackedValues
from flask_gsession.testing import FakeClock
from flask_gsession.typed import SessionKey
from flask_gsession.users.roster import Since
from flask_gsession.values.merge import last
from tests.harness.apps import STUCK, Site, SiteMaker, Visitor
from tests.harness.interleaving import at_each_step, before_line

THREADS = 4
ROUNDS = 40
REFUSALS = (LockMisused, TransactionMisused, SessionConflict)


@pytest.fixture(autouse=True)
def threads_switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def memory(clock: FakeClock) -> Iterator[Site]:
    """The threads meet in the request, so the fastest store shows most."""
    with SiteMaker("memory://", "", clock) as make:
        yield make(merge_policies={"clicks": "counter"})


def side_by_side(*work: Callable[[], None]) -> None:
    """Run each in its own thread, in the context of this request. Raises an error of any."""
    begin = threading.Barrier(len(work))
    errors: list[BaseException] = []

    def running(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            begin.wait(STUCK)
            try:
                function()
            except BaseException as error:
                errors.append(error)

        return copy_current_request_context(run)

    threads = [threading.Thread(target=running(function), daemon=True) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(STUCK)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def a_visitor(site: Site, values: dict[str, Any]) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(values))
    return visitor


def test_threads_that_look_first_get_the_same_object(memory: Site) -> None:
    keys = [f"key{number}" for number in range(200)]
    visitor = a_visitor(memory, {key: [key] for key in keys})
    looks: list[dict[str, Any]] = [{} for _ in range(THREADS)]

    def view(session: Any) -> None:
        def look(number: int) -> None:
            for key in keys:
                value = session[key] if number % 2 else session.get(key)
                looks[number][key] = value
                value.append(number)

        def add() -> None:
            for number in range(50):
                session[f"more{number}"] = number
                session.update_atomic("count", lambda count: count + 1, 0)

        side_by_side(*(lambda n=n: look(n) for n in range(THREADS)), add)  # type: ignore[misc]
        for key in keys:
            assert all(look[key] is session[key] for look in looks)

    visitor.run(view)
    stored = visitor.run(dict)
    assert stored["count"] == 50
    assert all(stored[f"more{number}"] == number for number in range(50))
    for key in keys:
        assert sorted(stored[key][1:]) == list(range(THREADS))


class Work:
    """Random work for the threads of one request, and its results."""

    def __init__(self, seed: int, session: Any, tab: Visitor) -> None:
        self.seed, self.session, self.tab = seed, session, tab
        # With all its keys: ``Counter.__missing__`` lets another thread run in between.
        self.done = Counter(log=0, hits=0, locked=0, transacted=0, refused=0)
        self.own: dict[str, int] = {}
        self.taken: list[str] = []

    def thread(self, number: int) -> Callable[[], None]:
        rng = Random(f"{self.seed} {number}")
        ways = [
            self.assign,
            self.update,
            self.click,
            self.take,
            self.look,
            self.lock,
            self.transact,
        ]

        def run() -> None:
            for step in range(ROUNDS):
                way = rng.choice(ways)
                try:
                    way(f"{number}.{step}")
                except REFUSALS:
                    self.done["refused"] += 1

        return run

    def beside(self) -> None:
        """Other requests of the visitor."""
        for number in range(ROUNDS // 2):
            self.tab.run(lambda session: session.update_atomic("hits", lambda hits: hits + 1))
            self.tab.run(lambda session, key=f"tab{number}": session.update({key: 1}))

    def assign(self, name: str) -> None:
        self.session[name] = 1
        self.own[name] = 1

    def update(self, name: str) -> None:
        self.session.update_atomic("log", lambda log: [*log, name])
        self.done["log"] += 1

    def click(self, name: str) -> None:
        self.session.update_atomic("hits", lambda hits: hits + 1)
        self.done["hits"] += 1

    def take(self, name: str) -> None:
        for number in range(5):
            found = self.session.take(f"once{number}", None)
            if found is not None:
                self.taken.append(found)

    def look(self, name: str) -> None:
        assert self.session["there"] == ["a"]
        assert "there" in self.session

    def lock(self, name: str) -> None:
        with self.session.lock():
            self.session["locked"] += 1
        self.done["locked"] += 1

    def transact(self, name: str) -> None:
        with self.session.transaction():
            self.session["transacted"] += 1
        self.done["transacted"] += 1


@pytest.mark.parametrize("seed", range(6))
def test_changes_by_threads_of_a_request_are_stored(memory: Site, seed: int) -> None:
    onces = {f"once{number}": f"value {number}" for number in range(5)}
    counts = {"hits": 0, "log": [], "locked": 0, "transacted": 0, "there": ["a"]}
    visitor = a_visitor(memory, {**counts, **onces})
    tab = visitor.another_tab()

    def view(session: Any) -> Work:
        work = Work(seed, session, tab)
        side_by_side(*map(work.thread, range(THREADS)), work.beside)
        return work

    work = visitor.run(view)
    stored = visitor.run(dict)
    assert stored["hits"] == work.done["hits"] + ROUNDS // 2
    assert len(stored["log"]) == len(set(stored["log"])) == work.done["log"]
    assert stored["locked"] == work.done["locked"]
    assert stored["transacted"] == work.done["transacted"]
    assert [key for key in work.own if key not in stored] == []
    assert all(stored[f"tab{number}"] == 1 for number in range(ROUNDS // 2))
    left = [stored[key] for key in onces if key in stored]
    assert sorted([*work.taken, *left]) == sorted(onces.values())


def test_a_change_right_after_the_first_look_of_a_transaction_is_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread makes it before the block begins, and the block is rolled back."""
    visitor = a_visitor(site, {"a": 0})
    look = transactions.open_from_store

    def view(session: Any) -> None:
        other = threading.Thread(
            target=copy_current_request_context(lambda: session.update(beside=1))
        )

        def look_and_be_overtaken(life: Lifecycle, what: str) -> Any:
            monkeypatch.setattr(transactions, "open_from_store", look)
            try:
                return look(life, what)
            finally:
                other.start()
                other.join(0.2)

        monkeypatch.setattr(transactions, "open_from_store", look_and_be_overtaken)
        with pytest.raises(ZeroDivisionError), session.transaction():
            session["a"] = 1 / 0
        other.join(STUCK)

    visitor.run(view)
    assert visitor.run(dict) == {"a": 0, "beside": 1}


def test_a_transaction_beside_a_lock_of_another_thread_is_refused(memory: Site) -> None:
    """The end of either would store half of the other."""
    visitor = a_visitor(memory, {"a": 0})

    def view(session: Any) -> None:
        entered, tried = threading.Event(), threading.Event()

        def lock() -> None:
            with session.lock():
                session["a"] = 1
                entered.set()
                assert tried.wait(STUCK)

        def transact() -> None:
            assert entered.wait(STUCK)
            with pytest.raises(TransactionMisused), session.transaction():
                session["b"] = 1
            tried.set()

        side_by_side(lock, transact)
        with session.lock(), session.transaction():  # in one thread there is no question
            session["c"] = 1

    visitor.run(view)
    assert visitor.run(dict) == {"a": 1, "c": 1}


@pytest.mark.parametrize("fails", [False, True])
def test_blocks_of_two_threads_end_in_any_order(memory: Site, fails: bool) -> None:
    """A receiver, or a thread, may be inside a block that began later and ends later."""
    visitor = a_visitor(memory, {"a": 0})

    def view(session: Any) -> None:
        life = session._life
        load(life)
        first = begin_block(life, "lock")
        second = begin_block(life, "lock")
        session["beside"] = 1
        leave_block(life, first)
        (roll_back if fails else leave_block)(life, second)
        assert life.block is None

    visitor.run(view)
    assert visitor.run(dict) == {"a": 0, "beside": 1}


READS: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "a value": (TrackedValues.__getitem__, lambda life: life.values["a"]),
    "a key": (TrackedValues.__contains__, lambda life: "a" in life.values),
    "the handle": (vars(Lifecycle)["handle"].fget, lambda life: life.handle),
    "the lifetime": (vars(Lifecycle)["lifetime"].fget, lambda life: life.lifetime),
    "the user": (ownership.user_id_of, ownership.user_id_of),
    "the device": (ownership.device_id_of, ownership.device_id_of),
    "the sign-in": (ownership.signed_in_at, ownership.signed_in_at),
    "the outage": (check_store, check_store),
    "the block": (in_retried_code, in_retried_code),
}


@pytest.mark.parametrize("read", READS)
def test_a_read_while_another_thread_replaces_the_state(memory: Site, read: str) -> None:
    """The other thread ends the session or a block, saves, or reloads after an outage."""
    function, look = READS[read]
    visitor = a_visitor(memory, {"a": 0})

    def view(session: Any) -> None:
        life = session._life
        load(life)
        seen = life.seen

        def settle() -> None:
            life.seen, life.wishes, life.outage = NOTHING_SEEN, NO_WISHES, None
            life.block = life.values.block = None

        for _ in at_each_step(function, settle):
            life.values.live = {}
            binding = Binding("ada", "device", Since(), fresh=True)
            life.seen, life.wishes = seen, Wishes(binding=binding)
            life.outage = Outage(StoreUnavailable("down"))
            begin_block(life, "transaction")
            with suppress(StoreUnavailable):
                look(life)
        settle()

    visitor.run(view)


def test_two_threads_wish_at_the_same_time(memory: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor = a_visitor(memory, {"a": 0})
    cookie = visitor.cookie

    def view(session: Any) -> None:
        other = threading.Thread(target=session.rotate)

        def replace(wishes: Wishes, **wanted: Any) -> Wishes:
            wished = msgspec.structs.replace(wishes, **wanted)
            if "lifetime" in wanted:
                other.start()
                other.join(0.2)  # unless it waits for this thread
            return wished

        monkeypatch.setattr(lifecycle, "replace", replace)
        session.set_lifetime(60)
        other.join(STUCK)

    visitor.run(view)
    assert visitor.cookie != cookie


def test_two_threads_open_a_second_session_at_the_same_time(memory: Site) -> None:
    second = Session(memory.app, store="memory://", cookie_name="second")
    visitor = a_visitor(memory, {"a": 0})

    def view(session: Any) -> None:
        add = copy_current_request_context(lambda: second.session.update(theirs=1))
        with before_line(GSessionInterface.open_session, "if app.after_request_funcs", add):
            second.session["mine"] = 1
        assert session.modified

    visitor.run(view)
    assert visitor.run(lambda _: dict(second.session)) == {"mine": 1, "theirs": 1}


def test_another_thread_stores_a_declared_counter_at_once(
    memory: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = SessionKey("visits", fields.Int(), merge="counter")
    visitor = a_visitor(memory, {"visits": 0})
    put = SessionData._put

    def view(session: Any) -> None:
        def store() -> None:
            with session.transaction():
                pass

        def put_and_store(*args: Any) -> None:
            put(*args)
            side_by_side(store)

        assert visits.get() == 0
        visitor.another_tab().run(lambda session: session.update(visits=10))
        monkeypatch.setattr(SessionData, "_put", put_and_store)
        visits.set(1)

    visitor.run(view)
    assert visitor.run(dict) == {"visits": 11}


def test_two_threads_declare_policies_at_the_same_time(memory: Site) -> None:
    class Switching(UserDict[str, Any]):
        def keys(self) -> KeysView[str]:
            other.start()
            other.join(0.2)  # unless it waits for this thread
            return super().keys()

    def view(session: Any) -> None:
        session._life.merge_by(Switching(mine=last))
        other.join(STUCK)
        assert session._life.policies.keys() == {"mine", "theirs"}

    other = threading.Thread(target=lambda: lives[0].merge_by({"theirs": last}))
    lives: list[Any] = []
    memory.visitor().run(lambda session: (lives.append(session._life), view(session)))


def test_the_first_look_may_come_from_a_thread(site: Site) -> None:
    """Flask doesn't call functions that a thread registered in its copy of the context."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    before = visitor.cookie

    def view(session: Any) -> None:
        side_by_side(lambda: session.rotate(grace=0), lambda: session.update(b=1))

    visitor.run(view)
    assert visitor.cookie != before
    assert visitor.run(dict) == {"a": 1, "b": 1}


def test_a_task_that_fails_under_a_lock_takes_nothing_of_the_others(site: Site) -> None:
    visitor = a_visitor(site, {"shared": [0]})

    async def work(session: Any) -> None:
        inside, written = asyncio.Event(), asyncio.Event()

        async def failing() -> None:
            async with session.lock():
                session["inside"] = 1
                inside.set()
                await written.wait()
                raise RuntimeError

        async def writing() -> None:
            session["before"] = 1
            await inside.wait()
            session["during"] = 1
            session["list"] = [1]
            session["list"].append(2)
            session.update_atomic("count", lambda count: count + 1, 0)
            written.set()

        outcomes = await asyncio.gather(failing(), writing(), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [RuntimeError, type(None)]
        session["after"] = 1

    visitor.run(lambda session: asyncio.run(work(session)))
    expected = {"before": 1, "during": 1, "list": [1, 2], "count": 1, "after": 1}
    assert visitor.run(dict) == {"shared": [0], **expected}


def test_writes_of_tasks_are_stored_while_others_wait_for_a_lock(site: Site) -> None:
    visitor = a_visitor(site, {"locked": 0})
    tab = visitor.another_tab()

    async def work(session: Any) -> None:
        async def locking(name: str) -> None:
            while True:
                try:
                    async with session.lock():
                        before = session["locked"]
                        await asyncio.sleep(0)
                        session["locked"] = before + 1
                    return
                except LockMisused:  # a sibling is in, or waits
                    await asyncio.sleep(0)

        async def writing(name: str) -> None:
            for number in range(10):
                session[f"{name}.{number}"] = number
                await asyncio.sleep(0)

        def other() -> None:
            def lock(session: Any) -> None:
                with session.lock():
                    session["locked"] += 1

            for _ in range(5):
                tab.run(lock)

        names = "abc"
        beside = asyncio.to_thread(other)
        await asyncio.gather(beside, *map(locking, names), *map(writing, names))

    visitor.run(lambda session: asyncio.run(work(session)))
    stored = visitor.run(dict)
    assert stored.pop("locked") == 8
    assert stored == {f"{name}.{number}": number for name in "abc" for number in range(10)}
