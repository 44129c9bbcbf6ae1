"""Session locks: one at a time, and no write by a holder whose lock ran out."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count as steps
from typing import Any

import pytest
from flask import Flask, Response, copy_current_request_context, stream_with_context

from flask_gsession import (
    LockLost,
    LockMisused,
    Session,
    SessionConflict,
    SessionEnded,
    SessionLocked,
    SettingError,
    StoreUnavailable,
    UnsupportedType,
    session,
    session_lock,
)
from flask_gsession.errors import UnreadableRecord
from flask_gsession.events import LockAcquired, LockExpired, LockRefused, LockReleased
from flask_gsession.request.blocks import roll_back
from flask_gsession.request.lease_renewal import renewer
from flask_gsession.request.locking import Lock
from flask_gsession.request.rebasing import roll_back_values
from flask_gsession.request.session import lifecycle_of
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.base import Replaced
from flask_gsession.testing import FakeClock
from flask_gsession.values.codec import Codec
from tests.harness.apps import STUCK as PATIENCE
from tests.harness.apps import Site, SiteMaker, Visitor, at_once, until
from tests.harness.interleaving import strike_at


def a_visitor(site: Site, **values: Any) -> Visitor:
    """A browser with a stored session."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(values or {"n": 0}))
    return visitor


def count(session: Any) -> int:
    """Count in the way that loses counts, unless there is a lock around it."""
    n = session["n"]
    time.sleep(0.001)
    session["n"] = n + 1
    return int(session["n"])


def count_locked(session: Any) -> int:
    with session.lock(wait=PATIENCE):
        return count(session)


def is_free(site: Site, visitor: Visitor) -> bool:
    """Whether the lock of the visitor's session can be had at once."""

    def take(session: Any) -> None:
        with session.lock(wait=0):
            pass

    return visitor.another_tab().ask(take).status_code == 200


class Waiter:
    """A request in a thread of its own; when it is made, it waits in the queue for the lock."""

    def __init__(self, visitor: Visitor, function: Callable[[Any], Any]) -> None:
        self.result: Any = None
        self.status = 0
        self._ask = lambda: visitor._ask(function, {})
        self._store = visitor.site.store
        self._thread = threading.Thread(target=self._run)
        self._asked = threading.Event()
        self._store.after("acquire", self._note)
        self._thread.start()
        until(lambda: self._asked.is_set() or self.status)

    def _note(self) -> None:
        if threading.current_thread() is self._thread:
            self._asked.set()
        else:
            self._store.after("acquire", self._note)

    def _run(self) -> None:
        response, visit = self._ask()
        self.result, self.status = visit.result, response.status_code

    def end(self) -> int:
        """The status of the answer."""
        self._thread.join(PATIENCE)
        return self.status


# The block ------------------------------------------------------------------------------------


def test_the_block_is_stored_at_its_end(site: Site) -> None:
    visitor = a_visitor(site, stock=3)
    tab = visitor.another_tab()

    def view(session: Any) -> Any:
        with session.lock() as same:
            assert same is not None
            session["stock"] -= 1
            session["cart"] = ["mug"]
            assert tab.run(dict) == {"stock": 3}
        return tab.run(dict)

    assert visitor.run(view) == {"stock": 2, "cart": ["mug"]}
    assert is_free(site, visitor)


def test_the_block_sees_the_stored_state(site: Site) -> None:
    visitor = a_visitor(site, stock=3)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        assert session["stock"] == 3
        tab.run(lambda other: other.update(stock=1))
        with session.lock():
            assert session["stock"] == 1

    visitor.run(view)


def test_changes_made_before_are_stored_first(site: Site) -> None:
    visitor = a_visitor(site, a=1)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        session["a"] = 2
        with session.lock():
            assert tab.run(dict) == {"a": 2}

    visitor.run(view)


def test_round_trips_of_a_lock(site: Site) -> None:
    visitor = a_visitor(site, n=1)
    with site.counted() as counted:
        visitor.run(count_locked)
    assert counted.calls == ["load", "acquire", "load", "save", "release"]
    with site.counted() as counted:
        visitor.run(lambda session: session["n"])
    assert counted.calls == ["load"]


def test_a_block_that_raises_stores_nothing(site: Site) -> None:
    visitor = a_visitor(site, cart=["mug"])
    handle = visitor.run(lambda session: session.handle)
    expiry = visitor.run(lambda session: session.expires_at)

    def view(session: Any) -> None:
        session["before"] = 1

        def block() -> None:
            with session.lock():
                session["cart"].append("bowl")
                session.rotate()
                session.set_lifetime(60)
                session["half"] = 1 // 0

        with pytest.raises(ZeroDivisionError):
            block()
        assert session["cart"] == ["mug"]
        assert is_free(site, visitor)
        session["after"] = 1

    visitor.run(view)
    assert visitor.run(dict) == {"cart": ["mug"], "before": 1, "after": 1}
    assert visitor.run(lambda session: session.handle) == handle
    assert visitor.run(lambda session: session.expires_at) == expiry


def test_the_end_of_the_request_stores_no_half_of_a_block(site: Site) -> None:
    """Another thread is in the middle of a block: the save stores its own changes, or nothing."""
    visitor = a_visitor(site, a=1)
    begun, saved = threading.Event(), threading.Event()

    def work() -> None:
        with suppress(ZeroDivisionError), session.lock():
            session["a"] = 2
            begun.set()
            assert saved.wait(PATIENCE)
            session["a"] = 1 // 0

    def view(session: Any) -> threading.Thread:
        session["before"] = True
        thread = threading.Thread(target=copy_current_request_context(work))
        thread.start()
        assert begun.wait(PATIENCE)
        return thread

    thread = visitor.run(view)
    saved.set()
    thread.join()
    assert visitor.run(dict) == {"a": 1, "before": True}


def test_a_transaction_that_raises_leaves_the_lifetime(site: Site) -> None:
    visitor = a_visitor(site, n=1)
    expiry = visitor.run(lambda session: session.expires_at)

    def view(session: Any) -> None:
        def block() -> None:
            with session.transaction():
                session.set_lifetime(60)
                raise KeyError

        with pytest.raises(KeyError):
            block()
        session["n"] = 2

    visitor.run(view)
    site.clock.advance(3600)
    visitor.run(lambda session: session.update(n=3))
    assert visitor.run(lambda session: session.expires_at) > expiry


def test_a_refused_value_stores_nothing(site: Site) -> None:
    visitor = a_visitor(site, a=1)

    def view(session: Any) -> None:
        def block() -> None:
            with session.lock():
                session["a"] = 2
                session["b"] = object()

        with pytest.raises(UnsupportedType):
            block()
        assert is_free(site, visitor)
        session["c"] = 3

    visitor.run(view)
    assert visitor.run(dict) == {"a": 1, "c": 3}


def test_transactions_and_atomic_updates_inside(site: Site) -> None:
    visitor = a_visitor(site, n=0, log=[])

    def view(session: Any) -> None:
        with session.lock():
            session["log"].append("one")
            session.update_atomic("n", lambda n: n + 1)
            session["log"].append("two")
            with session.transaction():
                session["n"] += 1
            session.transaction().run(lambda s: s.update(n=s["n"] + 1))
            session["log"].append("three")

    visitor.run(view)
    assert visitor.run(dict) == {"n": 3, "log": ["one", "two", "three"]}


def test_others_neither_wait_nor_are_refused(site: Site) -> None:
    visitor = a_visitor(site, a=1)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        with session.lock():
            session["mine"] = 1
            tab.run(lambda other: other.update(theirs=1))
            assert tab.run(dict) == {"a": 1, "theirs": 1}
            session.update_atomic("a", lambda a: a + 1)

    visitor.run(view)
    assert visitor.run(dict) == {"a": 2, "mine": 1, "theirs": 1}


def test_two_locks_one_after_the_other(site: Site) -> None:
    visitor = a_visitor(site)

    def view(session: Any) -> None:
        lock = session.lock()
        for _ in range(2):
            with lock:
                session["n"] += 1

    visitor.run(view)
    assert visitor.run(dict) == {"n": 2}


# Misuse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timeout", "wait"])
@pytest.mark.parametrize("value", [-1, 3601, float("nan"), float("inf"), "5", True, [1], 10**12])
def test_absurd_times(name: str, value: Any, clock: FakeClock) -> None:
    with Site("memory://", "", clock) as site:

        def view(session: Any) -> None:
            with pytest.raises(ValueError, match=rf"^{name} is .*; allowed: seconds .* to 3600"):
                session.lock(**{name: value})

        site.visitor().run(view)
    with pytest.raises(ValueError, match=f"^{name} is "):
        session_lock(**{name: value})


def test_a_timeout_of_nothing(clock: FakeClock) -> None:
    with pytest.raises(ValueError, match=r"allowed: .*: 0\.1 to 3600 seconds"):
        session_lock(timeout=0)
    session_lock(wait=0)


def test_a_timeout_without_its_name() -> None:
    without: Any = session_lock
    with pytest.raises(TypeError, match=r"@session_lock\(timeout=5\)"):
        without(5)


def refused(act: Callable[[Any], object]) -> Callable[[Any], None]:
    """A view in which `act` must raise `LockMisused`."""

    def view(session: Any) -> None:
        with pytest.raises(LockMisused):
            act(session)

    return view


def test_a_lock_in_a_lock(site: Site) -> None:
    visitor = a_visitor(site)

    def view(session: Any) -> None:
        with session.lock():
            refused(lambda session: session.lock().__enter__())(session)
            session["n"] = 1

    visitor.run(view)
    assert visitor.run(dict) == {"n": 1}
    assert is_free(site, visitor)


def test_a_lock_in_a_transaction(site: Site) -> None:
    visitor = a_visitor(site)

    def view(session: Any) -> None:
        with session.transaction():
            refused(lambda session: session.lock().__enter__())(session)
            session["n"] = 1

    visitor.run(view)
    assert visitor.run(dict) == {"n": 1}
    assert is_free(site, visitor)


def test_a_release_by_a_stranger_and_a_second_one(site: Site) -> None:
    visitor = a_visitor(site)

    def view(session: Any) -> None:
        lock = session.lock()
        with lock:
            refused(lambda session: session.lock().__exit__(None, None, None))(session)
            assert not is_free(site, visitor)
            session["n"] = 1
        refused(lambda _: lock.__exit__(None, None, None))(session)

    visitor.run(view)
    assert visitor.run(dict) == {"n": 1}


def test_a_session_that_is_not_stored(site: Site) -> None:
    enter = refused(lambda session: session.lock().__enter__())
    site.visitor().run(enter)

    def after_a_write(session: Any) -> None:
        session["n"] = 1
        with session.lock():  # stored first, so there is something to lock
            session["n"] = 2

    visitor = site.visitor()
    visitor.run(after_a_write)
    assert visitor.run(dict) == {"n": 2}

    def after_the_end(session: Any) -> None:
        session.destroy()
        enter(session)

    visitor.run(after_the_end)
    visitor = site.visitor("nonsense")
    visitor.run(enter)
    assert site.stored() == {}


def test_an_ended_session(site: Site) -> None:
    visitor = a_visitor(site)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        assert session["n"] == 0
        tab.run(lambda other: other.destroy())
        for _ in range(2):
            with pytest.raises(SessionEnded), session.lock():
                raise AssertionError("the block of an ended session ran")

    visitor.run(view)
    assert site.stored() == {}


def test_a_store_without_leases(clock: FakeClock) -> None:
    class Plain:
        def __init__(self, store: Any) -> None:
            for name in ("create", "load", "save", "renew", "replace", "delete", "close"):
                setattr(self, name, getattr(store, name))

    with Site("memory://", "", clock) as site:
        app = Flask(__name__)
        app.secret_key = "a key"
        Session(app, store=Plain(site.store))
        with app.test_request_context():
            session["n"] = 1
            with pytest.raises(SettingError, match="cannot keep session locks"):
                session.lock()


# The lock is had by one -----------------------------------------------------------------------


def test_a_request_that_does_not_wait_is_refused_at_once(site: Site) -> None:
    visitor = a_visitor(site)
    tab = visitor.another_tab()

    def second(session: Any) -> None:
        with session.lock(wait=0):
            raise AssertionError("two have the lock")

    def view(session: Any) -> None:
        with session.lock():
            response = tab.ask(second)
            assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
            assert "Another request is working" in response.get_data(as_text=True)

    visitor.run(view)
    [event] = site.happened(LockRefused)
    assert (event.reason, event.waited < PATIENCE) == ("too many waiters", True)
    assert event.handle == site.happened(LockAcquired)[0].handle


@pytest.mark.usefixtures("patient_waiters")
def test_one_waiter_too_many_is_refused_at_once(make_site: SiteMaker) -> None:
    site = make_site(lock_waiters=2, lock_wait=PATIENCE)
    visitor = a_visitor(site)

    def one_more(session: Any) -> None:
        with pytest.raises(SessionLocked, match="and 2 more wait for it"), session.lock():
            pass

    def view(session: Any) -> list[Waiter]:
        with session.lock():
            waiters = [Waiter(visitor.another_tab(), count_locked) for _ in range(2)]
            visitor.another_tab().run(one_more)
            return waiters

    assert [waiter.end() for waiter in visitor.run(view)] == [200, 200]
    assert visitor.run(dict) == {"n": 2}


def test_a_wait_that_ran_out_leaves_the_queue(make_site: SiteMaker) -> None:
    site = make_site(lock_waiters=1)
    visitor = a_visitor(site)

    def impatient(session: Any) -> None:
        with (
            pytest.raises(SessionLocked, match=r"not free within 0\.02 seconds"),
            session.lock(wait=0.02),
        ):
            pass

    def view(session: Any) -> None:
        with session.lock():
            for _ in range(3):  # the queue holds one
                visitor.another_tab().run(impatient)

    visitor.run(view)
    assert [event.reason for event in site.happened(LockRefused)] == ["wait over"] * 3
    assert is_free(site, visitor)


@pytest.mark.usefixtures("patient_waiters")
def test_waiters_get_the_lock_in_order(site: Site) -> None:
    visitor = a_visitor(site, order=[])

    def note(name: int) -> Callable[[Any], None]:
        def work(session: Any) -> None:
            with session.lock(wait=PATIENCE):
                session["order"].append(name)

        return work

    def view(session: Any) -> list[Waiter]:
        with session.lock():
            return [Waiter(visitor.another_tab(), note(number)) for number in range(5)]

    assert [waiter.end() for waiter in visitor.run(view)] == [200] * 5
    assert visitor.run(dict) == {"order": [0, 1, 2, 3, 4]}


def test_eight_clients_count_exactly(site: Site) -> None:
    visitor = a_visitor(site)
    cookie = visitor.cookie

    def client() -> None:
        tab = site.visitor(cookie)
        for _ in range(5):
            tab.run(count_locked)

    at_once(*[client] * 8)
    assert visitor.run(dict) == {"n": 40}
    assert len(site.happened(LockReleased)) == 40
    [stored] = site.stored().values()
    assert b"waiters" not in stored


def test_without_the_lock_they_would_not(site: Site) -> None:
    """The counting above loses counts by itself."""
    visitor = a_visitor(site)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        n = session["n"]
        tab.run(count)
        session["n"] = n + 1

    visitor.run(view)
    assert visitor.run(dict) == {"n": 1}


@pytest.mark.parametrize("name", ["redis", "mongodb"])
def test_a_pool_of_two_connections_serves_ten_waiters(
    name: str, request: pytest.FixtureRequest, store_prefix: str, clock: FakeClock
) -> None:
    url = request.getfixturevalue(f"{name}_url")
    store: Any = open_store(url, StoreOptions(store_prefix, PATIENCE, pool_max=2, clock=clock))[0]
    with Site(url, store_prefix, clock, store=store) as site:
        visitor = a_visitor(site)

        def view(session: Any) -> list[threading.Thread]:
            def client() -> None:
                visitor.another_tab().run(count_locked)

            with session.lock(wait=PATIENCE):
                waiters = [threading.Thread(target=client) for _ in range(10)]
                for waiter in waiters:
                    waiter.start()
                time.sleep(0.1)
                for _ in range(5):  # the store still answers, to everybody
                    assert visitor.another_tab().run(dict) == {"n": 0}
                return waiters

        for waiter in visitor.run(view):
            waiter.join()
        assert visitor.run(dict) == {"n": 10}


# The lock runs out ----------------------------------------------------------------------------


def set_n(session: Any) -> None:
    session["n"] = "late"


@pytest.mark.parametrize("somebody", [True, False], ids=["another holds it", "nobody holds it"])
@pytest.mark.parametrize(
    "write",
    [
        set_n,
        lambda session: session.update_atomic("n", lambda n: "late"),
        lambda session: session.transaction().run(set_n),
        lambda session: session.clear(),
        lambda session: session.rotate(),
        lambda session: session.rotate(grace=0),
        lambda session: None,
    ],
    ids=["set", "update_atomic", "transaction", "clear", "rotate", "rotate at once", "nothing"],
)
def test_a_holder_whose_lock_ran_out_stores_nothing(
    write: Callable[[Any], None], somebody: bool, site: Site
) -> None:
    visitor = a_visitor(site)
    tab = visitor.another_tab()
    handle = visitor.run(lambda session: session.handle)

    def view(session: Any) -> None:
        def block() -> None:
            with session.lock():
                site.clock.advance(10)  # paused
                if somebody:
                    tab.run(count_locked)
                write(session)

        with pytest.raises(LockLost):
            block()
        session.reload()
        assert session["n"] == somebody

    visitor.run(view)
    assert visitor.run(dict) == {"n": int(somebody)}
    assert visitor.run(lambda session: session.handle) == handle
    assert is_free(site, visitor)
    assert len(site.happened(LockExpired)) == 1


def test_a_lost_lock_that_nobody_catches_is_409(site: Site) -> None:
    visitor = a_visitor(site)

    def view(session: Any) -> None:
        with session.lock(timeout=3):
            site.clock.advance(3)
            session["n"] = 1

    response = visitor.ask(view)
    assert response.status_code == 409
    assert "lost its hold" in response.get_data(as_text=True)
    assert visitor.run(dict) == {"n": 0}


def test_a_late_holder_does_not_disturb_the_present_holder(site: Site) -> None:
    visitor = a_visitor(site)
    tab = visitor.another_tab()

    def late(session: Any) -> None:
        def holder(other: Any) -> None:
            with other.lock():
                other["n"] = 1
                with pytest.raises(LockLost):
                    lock.__exit__(None, None, None)
                assert not is_free(site, visitor)

        lock = session.lock(timeout=1)
        lock.__enter__()
        site.clock.advance(1)
        session["n"] = "late"
        tab.run(holder)

    visitor.run(late)
    assert visitor.run(dict) == {"n": 1}


@pytest.mark.usefixtures("patient_waiters")
def test_a_waiter_that_died_at_the_head_is_passed(site: Site) -> None:
    visitor = a_visitor(site)
    key = visitor.run(lambda session: session.handle)

    def view(session: Any) -> None:
        with session.lock():
            assert site.store.leases.acquire(key, "dead", 10_000, 10) > 0
        assert not is_free(site, visitor)
        site.clock.advance(50)
        assert is_free(site, visitor)

    visitor.run(view)


@pytest.mark.usefixtures("patient_waiters")
def test_a_lock_is_held_as_long_as_its_holder_lives(make_site: SiteMaker) -> None:
    """Longer than a lock lasts without a holder."""
    site = make_site(lock_warn=None)
    visitor = a_visitor(site)

    def view(session: Any) -> None:
        with session.lock(timeout=0.3):
            for _ in range(3):
                extended = threading.Event()
                site.store.after("extend", extended.set)
                assert extended.wait(PATIENCE)
                site.clock.advance(0.25)
            assert not is_free(site, visitor)
            session["n"] = 1

    visitor.run(view)
    assert visitor.run(dict) == {"n": 1}
    assert is_free(site, visitor)
    until(lambda: not renewer._running)


def test_a_lock_that_was_forgotten_runs_out(clock: FakeClock) -> None:
    """If its thread ended without leaving the block, the lock is not extended any longer."""
    with Site("memory://", "", clock) as site:
        visitor = a_visitor(site)

        def view(session: Any) -> None:
            session.lock(timeout=0.3).__enter__()

        visitor.run(view)
        assert not list(renewer._locks)
        site.clock.advance(0.3)
        assert is_free(site, visitor)


def test_an_extension_that_fails_is_tried_again(clock: FakeClock) -> None:
    with Site("memory://", "", clock) as site:
        visitor = a_visitor(site)

        def fail() -> None:
            raise StoreUnavailable("simulated")

        def view(session: Any) -> None:
            site.store.before("extend", fail)
            with session.lock(timeout=0.3):
                until(lambda: site.store.calls.count("extend") >= 2)
                session["n"] = 1

        visitor.run(view)
        assert visitor.run(dict) == {"n": 1}


def let_the_renewer_end() -> None:
    """It would by itself, when it was time to extend the last lock."""
    renewer.run(lambda: None)
    until(lambda: not renewer._running)


def no_thread(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let no thread of this name start."""
    start = threading.Thread.start

    def fail(self: threading.Thread) -> None:
        if self.name == name:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fail)


def test_locks_are_extended_after_a_thread_could_not_start(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Site("memory://", "", clock) as site:
        visitor = a_visitor(site)
        let_the_renewer_end()
        with monkeypatch.context() as short:
            no_thread(short, "gsession-locks")
            assert visitor.ask(count_locked).status_code == 500
        assert is_free(site, visitor)

        def view(session: Any) -> None:
            with session.lock(timeout=0.3):
                until(lambda: site.store.calls.count("extend") > 0)

        visitor.run(view)


def test_an_outage_where_no_thread_can_start(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing releases the lock, and the response still reports the outage."""
    visitor = a_visitor(site)
    let_the_renewer_end()
    no_thread(monkeypatch, "gsession-locks")
    site.store.after("acquire", lost_answer)
    assert visitor.ask(count_locked).status_code == 503


class Interrupt(BaseException):
    """As a worker's time limit strikes."""


def test_an_interrupt_just_after_the_lock_was_got(site: Site) -> None:
    visitor = a_visitor(site)

    def strike(event: LockAcquired) -> None:
        if not struck:
            struck.append(event)
            raise Interrupt

    def view(session: Any) -> None:
        with pytest.raises(Interrupt):
            session.lock().__enter__()
        assert lifecycle_of(session).lease is None
        assert is_free(site, visitor)
        count_locked(session)

    struck: list[LockAcquired] = []
    site.ext.on(LockAcquired, strike)
    visitor.run(view)
    assert visitor.run(dict) == {"n": 1}


# Beside the end of the session ----------------------------------------------------------------


@pytest.mark.parametrize("wrote", [True, False], ids=["something else", "nothing else"])
def test_a_value_that_cannot_be_read_inside_a_lock(
    wrote: bool, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request goes on with a new session, and the old one's lock is released."""
    visitor = a_visitor(site, bad=[1])

    def unreadable(*arguments: object) -> Any:
        raise UnreadableRecord("newer format", "by the test")

    def view(session: Any) -> None:
        with session.lock():
            with monkeypatch.context() as newer:
                newer.setattr(Codec, "decode", unreadable)
                assert session.get("bad") is None
            if wrote:
                session["n"] = 1
                session.update_atomic("n", lambda n: n + 1)
        assert is_free(site, visitor)

    visitor.another_tab().run(view)
    assert visitor.run(dict) == {"bad": [1]}
    assert not site.happened(LockExpired)


def test_a_logout_beside_a_lock(site: Site) -> None:
    visitor = a_visitor(site)
    waiting: list[Waiter] = []

    def view(session: Any) -> None:
        def block() -> None:
            with session.lock():
                waiting.append(Waiter(visitor.another_tab(), count_locked))
                visitor.another_tab().run(lambda other: other.destroy())
                session["n"] = 1

        with pytest.raises(SessionEnded):
            block()

    visitor.run(view)
    assert waiting[0].end() == 409
    assert site.stored() == {}
    assert len(site.happened(LockReleased)) == 1  # it did not run out


def test_a_logout_inside_a_lock(site: Site) -> None:
    visitor = a_visitor(site)

    def view(session: Any) -> Waiter:
        with session.lock():
            session["n"] = 1
            waiter = Waiter(visitor.another_tab(), count_locked)
            session.destroy()
            session["farewell"] = 1
            assert site.stored() == {}
            with session.transaction():
                session["again"] = 1
            session["last"] = 1
        return waiter

    assert visitor.run(view).end() == 409
    assert visitor.run(dict) == {"farewell": 1, "again": 1, "last": 1}
    assert is_free(site, visitor)


def test_clearing_inside_a_lock(site: Site) -> None:
    visitor = a_visitor(site)

    def view(session: Any) -> Waiter:
        with session.lock():
            waiter = Waiter(visitor.another_tab(), count_locked)
            session.clear()
        assert site.stored() == {}
        return waiter

    assert visitor.run(view).end() == 409
    assert visitor.cookie is None


def test_a_rotation_inside_a_lock_is_done_at_its_end(site: Site) -> None:
    visitor = a_visitor(site)
    before = visitor.run(lambda session: session.handle)

    def view(session: Any) -> Waiter:
        with session.lock():
            waiter = Waiter(visitor.another_tab(), count_locked)
            session.rotate()
            session["n"] = 10
            session.update_atomic("other", lambda _: 1)
            with session.transaction():
                session["n"] += 1
            assert session.handle == before
        assert session.handle != before
        return waiter

    waiter = visitor.run(view)
    assert (waiter.end(), waiter.result) == (200, 12)  # it followed the pointer
    assert visitor.run(dict) == {"n": 12, "other": 1}
    assert visitor.run(lambda session: session.handle) != before
    assert is_free(site, visitor)


def test_a_login_inside_a_lock_ends_the_wait_of_others(site: Site) -> None:
    visitor = a_visitor(site)

    def view(session: Any) -> Waiter:
        with session.lock():
            waiter = Waiter(visitor.another_tab(), count_locked)
            session["user"] = "ada"
            session.rotate(grace=0)
        return waiter

    assert visitor.run(view).end() == 409
    assert visitor.run(dict) == {"n": 0, "user": "ada"}


def test_a_rotation_beside_a_lock_ends_it(site: Site) -> None:
    visitor = a_visitor(site)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        def block() -> None:
            with session.lock():
                tab.run(lambda other: other.rotate())
                session["n"] = "late"

        with pytest.raises(LockLost):
            block()
        with session.lock():
            session["n"] += 1

    visitor.run(view)
    assert tab.run(dict) == {"n": 1}
    assert is_free(site, tab)


def test_a_rotation_just_before_the_lock_is_followed(site: Site) -> None:
    visitor = a_visitor(site)
    tab = visitor.another_tab()
    for operation in ("before", "after"):
        getattr(site.store, operation)("acquire", lambda: tab.run(lambda other: other.rotate()))
        assert visitor.run(count_locked) == (1 if operation == "before" else 2)
        assert tab.run(lambda session: session["n"]) == (1 if operation == "before" else 2)
    assert is_free(site, tab)


def test_a_reload_inside_a_lock(site: Site) -> None:
    visitor = a_visitor(site)
    handle = visitor.run(lambda session: session.handle)

    def view(session: Any) -> None:
        with session.lock():
            session["n"] = 5
            session.rotate()
            session.reload()
            session["n"] += 1

    visitor.run(view)
    assert visitor.run(dict) == {"n": 1}
    assert visitor.run(lambda session: session.handle) == handle


# Outages --------------------------------------------------------------------------------------


def lost_answer() -> None:
    raise StoreUnavailable("the answer was lost")


def test_the_answer_to_an_acquisition_is_lost(site: Site) -> None:
    visitor = a_visitor(site)
    site.store.after("acquire", lost_answer)
    assert visitor.ask(count_locked).status_code == 503
    until(lambda: is_free(site, visitor))  # released outside of the request


def test_the_answer_to_the_save_is_lost(site: Site) -> None:
    visitor = a_visitor(site)
    site.store.after("save", lost_answer)
    assert visitor.ask(count_locked).status_code == 503
    assert visitor.run(dict) == {"n": 1}  # once
    until(lambda: is_free(site, visitor))


def test_a_request_waits_for_an_outage_once(site: Site) -> None:
    """Another thread releases the lock."""
    visitor = a_visitor(site)
    answered = threading.Event()
    site.store.before("release", lambda: answered.wait(PATIENCE))
    site.store.before("save", lost_answer)
    began = time.monotonic()
    assert visitor.ask(count_locked).status_code == 503
    assert time.monotonic() - began < PATIENCE / 2
    answered.set()
    until(lambda: is_free(site, visitor))
    assert visitor.run(dict) == {"n": 0}


def test_a_rotation_that_replicas_have_not_confirmed(site: Site) -> None:
    visitor = a_visitor(site)

    def view(session: Any) -> None:
        with session.lock():
            session["n"] = 1
            session.rotate(grace=0)

    site.store.after("replace", lambda: Replaced("by the test"))
    assert visitor.ask(view).status_code == 503
    assert visitor.run(dict) == {"n": 1}  # with the new token
    assert is_free(site, visitor)
    assert not site.happened(LockExpired)


def test_a_release_that_fails_is_not_a_failure(site: Site) -> None:
    visitor = a_visitor(site)
    site.store.before("release", lost_answer)
    assert visitor.run(count_locked) == 1
    assert not is_free(site, visitor)
    site.clock.advance(10)
    assert is_free(site, visitor)


# Views, threads, streams ----------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True], ids=["view", "async view"])
@pytest.mark.parametrize("options", [{}, {"wait": PATIENCE}], ids=["plain", "with options"])
def test_the_decorator_locks_the_view(
    asynchronous: bool, options: dict[str, Any], site: Site
) -> None:
    decorate: Any = session_lock(**options) if options else session_lock
    free: list[bool] = []

    def work() -> str:
        if "n" in session:
            free.append(is_free(site, visitor))
        return str(count(session)) if "n" in session else "new"

    if asynchronous:

        @site.app.get("/count")
        @decorate
        async def count_async() -> str:
            """The docstring of the view."""
            return work()

        view: Any = count_async
    else:

        @site.app.get("/count")
        @decorate
        def count_plainly() -> str:
            """The docstring of the view."""
            return work()

        view = count_plainly
    assert view.__doc__ == "The docstring of the view."
    assert site.visitor().get("/count").get_data(as_text=True) == "new"
    assert "acquire" not in site.store.calls
    visitor = a_visitor(site)
    assert visitor.get("/count").get_data(as_text=True) == "1"
    assert free == [False]
    assert is_free(site, visitor)
    assert visitor.run(dict) == {"n": 1}


def test_a_view_that_raises_gives_the_lock_back(site: Site) -> None:
    @site.app.get("/fail")
    @session_lock
    def fail() -> str:
        session["n"] = 1 // 0
        return ""

    visitor = a_visitor(site)
    assert visitor.get("/fail").status_code == 500
    assert visitor.run(dict) == {"n": 0}
    assert is_free(site, visitor)


def test_without_a_session_the_decorator_names_the_missing_setting(site: Site) -> None:
    site.app.secret_key = None

    @site.app.get("/locked")
    @session_lock
    def view() -> str:
        return ""

    with (
        site.app.test_request_context("/locked"),
        pytest.raises(SettingError, match="session_lock needs a Session"),
    ):
        view()


def test_the_event_loop_does_not_wait(site: Site) -> None:
    """Two tasks of one async view: one waits for the lock, the other goes on."""
    locked, ticked = threading.Event(), threading.Event()

    def holder(other: Any) -> None:
        with other.lock():
            locked.set()
            assert ticked.wait(PATIENCE)
            other["n"] = 1

    @site.app.get("/async")
    async def view() -> str:
        async def tick() -> None:
            while "acquire" not in site.store.calls[asked:]:
                await asyncio.sleep(0.001)
            ticked.set()

        ticking = asyncio.create_task(tick())
        async with session.lock(wait=PATIENCE):
            session["n"] += 1
        await ticking
        return str(session["n"])

    visitor = a_visitor(site)
    thread = threading.Thread(target=visitor.another_tab().run, args=(holder,))
    thread.start()
    assert locked.wait(PATIENCE)
    asked = len(site.store.calls)
    assert visitor.get("/async").get_data(as_text=True) == "2"
    thread.join()
    assert visitor.run(dict) == {"n": 2}


def test_a_cancelled_wait_leaves_the_queue(clock: FakeClock) -> None:
    with Site("memory://", "", clock) as site:
        cancel_a_wait(site)


def cancel_a_wait(site: Site) -> None:
    @site.app.get("/impatient")
    async def view() -> str:
        async def lock() -> None:
            async with session.lock(wait=PATIENCE):
                session["n"] = "never"

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(lock(), 0.05)
        return ""

    def holder(other: Any) -> None:
        with other.lock():
            began = time.monotonic()
            assert visitor.another_tab().get("/impatient").status_code == 200
            assert time.monotonic() - began < PATIENCE / 2

    visitor = a_visitor(site)
    visitor.run(holder)
    assert is_free(site, visitor)
    assert visitor.run(dict) == {"n": 0}


def test_a_wait_that_is_cancelled_twice_gives_the_lock_back(clock: FakeClock) -> None:
    """The second time while the thread that waits is just getting it."""
    with Site("memory://", "", clock) as site:
        visitor = a_visitor(site)

        def view(session: Any) -> None:
            async def lock() -> None:
                async with session.lock():
                    raise AssertionError("it was cancelled")

            async def cancel() -> None:
                task = asyncio.create_task(lock())
                while not asked.is_set():
                    await asyncio.sleep(0.001)
                for _ in range(3):
                    task.cancel()
                    await asyncio.sleep(0)
                go_on.set()
                with pytest.raises(asyncio.CancelledError):
                    await task

            def ask() -> None:
                asked.set()
                go_on.wait(PATIENCE)

            asked, go_on = threading.Event(), threading.Event()
            site.store.after("acquire", ask)
            asyncio.run(cancel())
            assert is_free(site, visitor)

        visitor.run(view)


def test_an_event_loop_that_ends_waits_for_the_lock_to_be_given_back(clock: FakeClock) -> None:
    """It cancels all its tasks."""
    with Site("memory://", "", clock) as site:
        visitor = a_visitor(site)

        def view(session: Any) -> None:
            async def lock() -> None:
                async with session.lock():
                    raise AssertionError("it was cancelled")

            async def end() -> None:
                tasks.append(asyncio.create_task(lock()))
                while not asked.is_set():
                    await asyncio.sleep(0.001)
                asyncio.get_running_loop().call_later(0.05, go_on.set)

            def ask() -> None:
                asked.set()
                go_on.wait(PATIENCE)

            tasks: list[asyncio.Task[None]] = []
            asked, go_on = threading.Event(), threading.Event()
            site.store.after("acquire", ask)
            asyncio.run(end())
            assert is_free(site, visitor)

        visitor.run(view)


def test_a_thread_of_the_request(site: Site) -> None:
    visitor = a_visitor(site)

    def view(session: Any) -> None:
        @copy_current_request_context
        def work() -> None:
            count_locked(session)
            free.append(is_free(site, visitor))

        free: list[bool] = []
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert free == [True]
        with session.lock():
            thread = threading.Thread(
                target=copy_current_request_context(
                    lambda: refused(lambda session: session.lock().__enter__())(session)
                )
            )
            thread.start()
            thread.join()

    visitor.run(view)
    assert visitor.run(dict) == {"n": 1}


def test_the_lock_is_given_back_before_a_streamed_body(site: Site) -> None:
    seen: list[object] = []

    @site.app.get("/stream")
    @session_lock
    def stream() -> Response:
        session["n"] = 1

        def body() -> Any:
            seen.append(is_free(site, visitor))
            with session.lock():
                session["n"] += 1
            yield "x"

        return Response(stream_with_context(body()))

    visitor = a_visitor(site)
    assert visitor.get("/stream").get_data(as_text=True) == "x"
    assert seen == [True]
    assert visitor.run(dict) == {"n": 2}


# Warnings and events --------------------------------------------------------------------------


def test_a_long_hold_is_warned_about(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """Once while it lasts, and once at its end."""
    caplog.set_level(logging.WARNING, "flask_gsession")
    with Site("memory://", "", clock, lock_warn=0.02) as site:

        @site.app.get("/slow")
        @session_lock
        def slow() -> str:
            if "n" in session:
                until(lambda: caplog.records)
            return ""

        visitor = a_visitor(site)
        assert visitor.get("/slow").status_code == 200
    still, after = (record.getMessage() for record in caplog.records)
    assert "has been held for" in still
    assert "was held for" in after
    for message in (still, after):
        assert "the view 'slow'" in message
        assert "test_a_long_hold_is_warned_about.<locals>.slow" in message


@pytest.mark.parametrize("warn", [None, 0])
def test_no_warning_where_none_is_wanted(
    warn: float | None, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "flask_gsession")
    with Site("memory://", "", clock, lock_warn=warn) as site:
        visitor = a_visitor(site)
        visitor.run(count_locked)
    assert not caplog.records


def test_events_of_locks(site: Site) -> None:
    visitor = a_visitor(site)
    handle = visitor.run(lambda session: session.handle)
    visitor.run(count_locked)
    [acquired], [released] = site.happened(LockAcquired), site.happened(LockReleased)
    assert acquired.handle == released.handle == handle
    assert 0 <= acquired.waited < PATIENCE
    assert 0 < released.held < PATIENCE
    assert not site.happened(LockExpired)
    assert not site.happened(LockRefused)


def test_errors_that_handlers_know(clock: FakeClock) -> None:
    assert issubclass(LockLost, SessionConflict)
    assert LockLost().code == 409
    assert SessionLocked("why").code == 503
    assert str(SessionLocked("why")) == "why"
    assert Lock.__doc__


@pytest.mark.parametrize("function", [roll_back, roll_back_values])
def test_a_failed_block_of_a_lock_stores_nothing_even_if_interrupted_again(
    site: Site, function: Callable[..., Any]
) -> None:
    class Killed(BaseException):
        """As gevent's Timeout, at each step in turn."""

    for step in steps():
        visitor = site.visitor()
        visitor.run(lambda session: session.update(left=1))

        def view(session: Any, step: int = step) -> bool:
            with (
                strike_at(function, step, Killed) as struck,
                suppress(Killed, ZeroDivisionError),
                session.lock(),
            ):
                session["left"] = 0
                session["paid"] = 1 // 0
            session["after"] = True
            return bool(struck)

        was_struck = visitor.run(view)
        assert visitor.run(dict) == {"left": 1, "after": True}, step
        if not was_struck:
            break
