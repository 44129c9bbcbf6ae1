"""One client that waits for locks, of one session or of many, leaves threads to the others."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from flask import Flask

from flask_gsession.errors import SessionLocked
from flask_gsession.events import LockRefused
from flask_gsession.request.waiting import client, may_wait, stop_waiting
from tests.harness.apps import PATIENCE, STUCK, Site, SiteMaker, Visitor


def locked(session: Any) -> None:
    with session.lock(wait=PATIENCE):
        session["n"] += 1


def a_visitor(site: Site) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(n=0))
    return visitor


@pytest.mark.usefixtures("patient_waiters")
def test_a_client_of_many_sessions_is_bounded(make_site: SiteMaker) -> None:
    site = make_site(lock_client_waiters=2, lock_wait=PATIENCE)
    visitors = [a_visitor(site) for _ in range(3)]
    threads: list[threading.Thread] = []
    statuses: list[int] = []

    def wait(visitor: Visitor) -> None:
        statuses.append(visitor.another_tab().ask(locked).status_code)

    def all_wait(held: int) -> None:
        """Hold the locks of all sessions, and let requests of this client wait for them."""
        if held < len(visitors):
            visitors[held].another_tab().run(lambda session: hold(session, held))
            return
        for visitor in visitors[:2]:
            threads.append(threading.Thread(target=wait, args=(visitor,)))
            threads[-1].start()
        until_two_wait()
        visitors[2].another_tab().run(refused)
        elsewhere = {"REMOTE_ADDR": "192.0.2.7"}
        threads.append(threading.Thread(target=wait_elsewhere, args=(elsewhere,)))
        threads[-1].start()

    def hold(session: Any, held: int) -> None:
        with session.lock():
            all_wait(held + 1)

    def until_two_wait() -> None:
        from flask_gsession.request import waiting

        end = threading.Event()
        for _ in range(int(STUCK / 0.01)):
            if sum(len(owners) for owners in waiting._waiting.values()) == 2:
                return
            end.wait(0.01)
        raise AssertionError("they do not wait")

    def refused(session: Any) -> None:
        with pytest.raises(SessionLocked, match="2 requests of this client"), session.lock():
            pass

    def wait_elsewhere(environ: dict[str, str]) -> None:
        tab = visitors[2].another_tab()
        statuses.append(tab.ask(locked, environ_base=environ).status_code)

    all_wait(0)
    for thread in threads:
        thread.join(STUCK)
    assert statuses == [200] * 3
    assert [event.reason for event in site.happened(LockRefused)] == ["too many waiters"]
    assert [visitor.run(lambda session: session["n"]) for visitor in visitors] == [1, 1, 1]
    a_visitor(site).run(locked)


def test_a_request_that_stops_waiting_makes_room() -> None:
    assert may_wait("192.0.2.1", "a", 2)
    assert may_wait("192.0.2.1", "b", 2)
    assert may_wait("192.0.2.1", "a", 2)
    assert not may_wait("192.0.2.1", "c", 2)
    assert may_wait("192.0.2.2", "c", 2)
    assert may_wait("", "c", 0)
    assert may_wait("192.0.2.1", "c", None)
    stop_waiting("192.0.2.1", "a")
    assert may_wait("192.0.2.1", "c", 2)
    for address in ("192.0.2.1", "192.0.2.2", "192.0.2.3"):
        for owner in "abc":
            stop_waiting(address, owner)
    assert may_wait("192.0.2.1", "d", 1)
    stop_waiting("192.0.2.1", "d")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2"),
        ("2001:db8:1:2::6", "2001:db8:1:2"),
        ("2001:db8::6", "2001:db8:0:0"),
        ("::1", "0:0:0:0"),
        ("::ffff:192.0.2.7", "::ffff:192.0.2.7"),
    ],
)
def test_a_client_is_an_address_or_a_network(address: str, expected: str) -> None:
    with Flask(__name__).test_request_context(environ_base={"REMOTE_ADDR": address}):
        assert client() == expected
    assert client() == ""
