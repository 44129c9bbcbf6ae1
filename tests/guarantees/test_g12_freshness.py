"""G12: with the near cache on, a request never sees records older than the bound.

How the cache itself decides: tests/stores/test_near_cache.py. The protocol, in every interleaving:
tests/simulation/near_cache_model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, Response

from flask_gsession import Session, require_fresh
from flask_gsession.errors import SettingError
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, Visitor
from tests.harness.topologies import until

BOUND = 5.0  # seconds; far longer than any test here takes

Worker = Callable[..., Site]


@pytest.fixture
def worker(redis_url: str, store_prefix: str, clock: FakeClock) -> Iterator[Worker]:
    """One more worker with a near cache, over the same records: `worker(**settings)`."""
    with SiteMaker(redis_url, store_prefix, clock) as make:
        yield lambda **settings: make(**{"near_cache": BOUND, **settings})


def calls_of(site: Site, work: Callable[[], object]) -> list[str]:
    """The calls of the store that `work` makes."""
    site.store.calls.clear()
    work()
    return list(site.store.calls)


def warmed(site: Site, visitor: Visitor) -> None:
    """Read until the session is near: at first nothing is proven yet."""

    def is_near() -> bool:
        return calls_of(site, lambda: visitor.run(dict)) == []

    until(is_near, "a read from the near cache")


@pytest.fixture
def site(worker: Worker) -> Site:
    return worker()


@pytest.fixture
def visitor(site: Site) -> Visitor:
    """Has a session with `cart`, which is near."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    warmed(site, visitor)
    return visitor


def test_a_read_costs_no_call(site: Site, visitor: Visitor) -> None:
    read: list[Any] = []
    assert calls_of(site, lambda: read.append(visitor.run(dict))) == []
    assert read == [{"cart": ["mug"]}]


def test_a_read_and_a_write_cost_one_call(site: Site, visitor: Visitor) -> None:
    work = lambda: visitor.run(lambda session: session["cart"].append("pot"))  # noqa: E731
    assert calls_of(site, work) == ["save"]
    assert visitor.run(dict) == {"cart": ["mug", "pot"]}


def test_the_end_of_a_session_is_seen(site: Site, worker: Worker, visitor: Visitor) -> None:
    """At once in the worker that ended it, elsewhere as soon as that is heard."""
    other = worker()
    there = other.visitor(visitor.cookie)
    warmed(other, there)
    here = visitor.another_tab()
    visitor.run(lambda session: session.clear())
    assert here.run(dict) == {}
    until(lambda: there.run(dict) == {}, "the end", timeout=BOUND / 2)


def test_a_change_on_another_worker_is_seen(site: Site, worker: Worker, visitor: Visitor) -> None:
    there = worker().visitor(visitor.cookie)
    there.run(lambda session: session.update(cart=[]))
    until(lambda: visitor.run(dict) == {"cart": []}, "the change", timeout=BOUND / 2)


def test_a_race_lost_by_an_old_record_is_merged(
    site: Site, worker: Worker, visitor: Visitor
) -> None:
    other = worker().visitor(visitor.cookie)

    def add(session: Any) -> None:
        assert dict(session) == {"cart": ["mug"]}
        other.run(lambda session: session.update(theme="dark"))
        session["cart"] = ["pot"]

    visitor.run(add)
    assert visitor.run(dict) == {"cart": ["pot"], "theme": "dark"}


def kept_at(site: Site) -> Any:
    """The record that this worker keeps."""
    near: Any = site.app.extensions["gsession"][site.ext].repository.near
    return near._kept


def deaf(site: Site) -> None:
    """From now on this worker hears of no change, but believes that it does."""
    kept = kept_at(site)
    kept.changed = kept.lost = lambda *_: None


@pytest.mark.parametrize("header", [None, "X-Session"])
def test_a_client_sees_its_own_write_at_any_worker(worker: Worker, header: str | None) -> None:
    """Even at one that has not heard of it yet."""
    first, second = worker(token_header=header), worker(token_header=header)
    headers: dict[str, str] = {"X-Session": ""} if header else {}
    cookies: dict[str, str] = {}

    def at(site: Site, function: Callable[[Any], object]) -> Any:
        client = site.visitor()
        for name, value in cookies.items():
            client.set_cookie(name, value)
        with site.visit(function) as visit:
            response = client.open(visit.path, headers=headers)
        assert response.status_code == 200
        for name in ("X-Session", "X-Session-Version"):
            if name in response.headers:
                headers[name] = response.headers[name]
        for cookie in response.headers.getlist("Set-Cookie"):
            name, _, value = cookie.partition(";")[0].partition("=")
            cookies[name] = value
        return visit.result

    at(first, lambda session: session.update(step=1))
    until(lambda: calls_of(second, lambda: at(second, dict)) == [], "a near read")
    deaf(second)
    at(first, lambda session: session.update(step=2))
    assert bool(cookies) is not bool(header)
    assert at(second, dict) == {"step": 2}


def test_the_version_is_sent_only_after_a_write(site: Site, visitor: Visitor) -> None:
    def cookies(function: Callable[[Any], object]) -> list[str]:
        response = visitor.ask(function)
        assert ("no-store" in response.headers.get("Cache-Control", "")) == (
            "Set-Cookie" in response.headers
        )
        return response.headers.getlist("Set-Cookie")

    assert cookies(dict) == []
    (cookie,) = cookies(lambda session: session.update(a=1))
    assert cookie.startswith("session-v=")
    for attribute in ("Max-Age=5", "HttpOnly", "Path=/"):
        assert attribute in cookie
    assert visitor.token not in cookie


@pytest.mark.parametrize("version", ["", "x", "-1", "1" * 21, "²", "9" * 20])
def test_any_version_may_be_sent(site: Site, visitor: Visitor, version: str) -> None:
    visitor.set_cookie("session-v", version)
    assert visitor.run(dict) == {"cart": ["mug"]}


BLOCKS: dict[str, Callable[[Any], Any]] = {
    "lock": lambda session: session.lock(),
    "transaction": lambda session: session.transaction(),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("looked", [False, True], ids=["first", "after a look"])
def test_blocks_begin_on_the_stored_state(
    site: Site, worker: Worker, visitor: Visitor, block: str, looked: bool
) -> None:
    there = worker().visitor(visitor.cookie)
    deaf(site)
    there.run(lambda session: session.update(cart=["pot"]))

    def within(session: Any) -> Any:
        if looked:
            assert session["cart"] == ["mug"]
        with BLOCKS[block](session):
            return session["cart"]

    assert visitor.run(within) == ["pot"]


@pytest.mark.parametrize("looked", [False, True], ids=["first", "after a look"])
def test_a_sign_in_begins_on_the_stored_state(
    site: Site, worker: Worker, visitor: Visitor, looked: bool
) -> None:
    there = worker().visitor(visitor.cookie)
    deaf(site)
    there.run(lambda session: session.update(cart=["pot"]))

    def sign_in(session: Any) -> int:
        if looked:
            assert session["cart"] == ["mug"]
        site.store.calls.clear()
        session.bind("ann")
        return site.store.calls.count("load")

    assert visitor.run(sign_in) == 2  # the session, and the roster
    assert visitor.run(dict)["cart"] == ["pot"]


def test_fresh_authentication_is_judged_by_the_stored_state(
    site: Site, worker: Worker, visitor: Visitor
) -> None:
    page = require_fresh(5)(lambda: Response("secret"))
    visitor.run(lambda session: session.confirm())
    warmed(site, visitor)
    there = worker().visitor(visitor.cookie)
    deaf(site)
    assert visitor.ask(lambda session: page()).get_data(as_text=True) == "secret"
    there.run(lambda session: session.destroy())
    assert visitor.run(dict) != {}  # within the bound
    assert visitor.ask(lambda session: page()).status_code == 401


def test_a_confirmation_begins_on_the_stored_state(
    site: Site, worker: Worker, visitor: Visitor
) -> None:
    there = worker().visitor(visitor.cookie)
    deaf(site)
    there.run(lambda session: session.destroy())

    def confirm(session: Any) -> list[str]:
        assert session["cart"] == ["mug"]
        return calls_of(site, session.confirm)

    assert visitor.run(confirm) == ["load"]
    assert visitor.run(lambda session: session.confirmed_at()) is None


def test_an_expiry_is_judged_at_each_read(site: Site, visitor: Visitor, clock: FakeClock) -> None:
    clock.advance(3 * 3600)
    assert visitor.run(dict) == {}


def test_a_renewal_elsewhere_counts(
    site: Site, worker: Worker, visitor: Visitor, clock: FakeClock
) -> None:
    deaf(site)
    clock.advance(7000)
    worker().visitor(visitor.cookie).run(dict)  # which renews it
    clock.advance(1000)
    assert visitor.run(dict) == {"cart": ["mug"]}


def test_records_are_kept_encrypted(worker: Worker) -> None:
    site = worker(encryption_keys="k" * 43)
    visitor = site.visitor()
    visitor.run(lambda session: session.update(card="4111 1111"))
    warmed(site, visitor)
    records = [record for record, _ in kept_at(site).entries.values()]
    assert len(records) == 1
    assert b"4111" not in records[0].payload
    assert records[0].body is None


def test_a_kept_session_is_decoded_once_and_shared_by_no_two_requests(
    site: Site, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = site.app.extensions["gsession"][site.ext].repository
    monkeypatch.setattr(repository.records, "read", None)  # nothing can be decoded again
    seen: list[dict[str, Any]] = []

    def change(session: Any) -> None:
        session["cart"].append("pot")
        session["theme"] = "dark"
        visitor.another_tab().run(lambda session: seen.append(dict(session)))

    visitor.run(change)
    assert seen == [{"cart": ["mug"]}]


def test_an_outage_of_the_store_empties_the_near_cache(site: Site, visitor: Visitor) -> None:
    kept_at(site)._changes.close()
    assert calls_of(site, lambda: visitor.run(dict)) == ["load"]


@pytest.mark.parametrize("url", ["memory://", "sqlite:///near.sqlite3", "mongodb://localhost/x"])
def test_a_store_that_proves_nothing_refuses_the_setting(url: str) -> None:
    app = Flask(__name__)
    with pytest.raises(SettingError, match="SESSION_NEAR_CACHE can't be used"):
        Session(app, store=url, near_cache=0.25)
    Session(app, store=url, near_cache=0)


def test_the_near_cache_is_off_by_default(
    redis_url: str, store_prefix: str, clock: FakeClock
) -> None:
    with SiteMaker(redis_url, store_prefix, clock) as make:
        site = make()
        visitor = site.visitor()
        visitor.run(lambda session: session.update(a=1))
        for _ in range(3):
            assert calls_of(site, lambda: visitor.run(dict)) == ["load"]
        assert "session-v" not in str(visitor.ask(lambda session: session.update(b=1)).headers)


def test_the_debug_dump_says_when_the_near_cache_was_used(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    site = worker(debug=True)
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    assert "near cache" not in caplog.text
    warmed(site, visitor)
    assert "near cache used for the first read" in caplog.text


def test_without_background_threads_the_start_warns(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flask_gsession.processes.runs_threads", lambda: False)
    Session(Flask(__name__), store=redis_url)
    assert "SESSION_NEAR_CACHE" not in caplog.text
    Session(Flask(__name__), store=redis_url, near_cache=0.25)
    assert "SESSION_NEAR_CACHE has no effect" in caplog.text
    assert "enable-threads" in caplog.text
