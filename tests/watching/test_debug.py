"""The debug dump, on every store: its facts, the values it hides, and its limits."""

from __future__ import annotations

import base64
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, redirect, session
from flask_debugtoolbar import DebugToolbarExtension
from prometheus_client import CollectorRegistry, generate_latest

from flask_gsession import Session, StoreUnavailable
from flask_gsession.cli import gsession
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.stores.base import Record, new_version
from flask_gsession.testing import FakeClock
from flask_gsession.tokens import TokenSigner, session_key
from tests.harness.apps import Site, SiteMaker, Visitor

Facts = dict[str, Any]


class Log:
    """The dumps in the log so far."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def records(self, when: str = "after") -> list[logging.LogRecord]:
        return [
            record
            for record in self._caplog.records
            if record.name == "flask_gsession.debug"
            and record.getMessage().startswith(f"Session {when} ")
        ]

    def facts(self, when: str = "after") -> Facts:
        """Those of the latest dump."""
        facts: Facts = self.records(when)[-1].gsession  # type: ignore[attr-defined]
        json.dumps(facts)  # for logs that are read by a program
        return facts

    def text(self, when: str = "after") -> str:
        return self.records(when)[-1].getMessage()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    return Log(caplog)


@pytest.fixture
def debugged(make_site: SiteMaker) -> Site:
    """A site on each store in turn, that is debugged."""
    return make_site(debug=True, debug_show=["cart"])


@pytest.fixture
def in_memory(store_prefix: str, clock: FakeClock) -> Any:
    """A debugged site in memory: for what no store can change."""
    with SiteMaker("memory://", store_prefix, clock) as make:
        yield lambda **settings: make(debug=True, **settings)


def fill(session: Any) -> None:
    session.update(cart=["mug"], user_id=7, old=None)
    session.set("hint", "once", ttl=60)


def names(found: list[Facts]) -> list[str]:
    return [about["key"] for about in found]


def test_a_request_is_dumped_before_and_after(debugged: Site, log: Log) -> None:
    visitor = debugged.visitor()
    visitor.run(fill)
    assert log.facts("before")["found"] == "no token"
    created = log.facts()
    assert (created["state"], created["status"]) == ("new", 200)
    assert created["request"] == "GET /do/<int:number>"
    assert names(created["written"]) == ["cart", "user_id", "old", "hint"]
    assert created["cookie"] == "set: the session is new"
    assert created["cache"] == {"Vary": "Cookie", "Cache-Control": "no-store"}

    def view(session: Any) -> None:
        session["cart"].append("pen")
        session.get("theme")
        assert session["user_id"] == 7
        assert session["hint"] == "once"
        del session["old"]

    visitor.run(view)
    handle = session_key(visitor.token)
    assert log.facts("before")["found"] == f"a cookie for {handle}"
    facts = log.facts()
    assert (facts["state"], facts["handle"]) == ("loaded", handle)
    assert names(facts["read"]) == ["cart", "user_id", "hint"]
    assert facts["absent"] == ["theme"]
    assert facts["deleted"] == ["old"]
    (cart,) = facts["written"]
    assert cart == {
        "key": "cart",
        "type": "list",
        "bytes_before": 5,
        "bytes": 9,
        "value": "['mug', 'pen']",
    }
    (hint,) = (about for about in facts["read"] if about["key"] == "hint")
    assert hint == {"key": "hint", "type": "str", "bytes": 19, "expires_in": 60.0}
    assert facts["idle_left"] == 7260
    assert facts["absolute_left"] == 31 * 86400
    assert [call["operation"] for call in facts["calls"]] == ["load", "save"]
    assert [call["result"] for call in facts["calls"]] == ["ok", "ok"]
    assert facts["events"][0].startswith("SessionSaved(payload_bytes=")
    assert facts["cookie"] == "unchanged: the client has it"
    assert facts["cache"] == {"Vary": "Cookie"}
    assert log.text().splitlines()[0] == "Session after GET /do/<int:number> -> 200: loaded"
    assert "  written    cart: list, 5 to 9 bytes, ['mug', 'pen']" in log.text()


def test_the_dump_shows_the_size_of_a_large_value(debugged: Site, log: Log) -> None:
    """The dump doesn't read a value more often than the request, even to show it."""
    visitor = debugged.visitor()
    visitor.run(lambda session: session.update(cart=b"x" * 30_000, user_id=7))
    (cart, _) = log.facts()["written"]
    assert cart == {"key": "cart", "type": "bytes", "bytes": 30_000, "large": True}
    assert "  written    cart: bytes, 30000 bytes, large" in log.text()
    visitor.run(lambda session: "cart" in session)
    facts = log.facts()
    assert facts["bytes"] < 300
    assert facts["read"] == [{"key": "cart", "type": None, "bytes": 30_000, "large": True}]
    assert [call["operation"] for call in facts["calls"]] == ["load"]
    visitor.run(lambda session: session.set("cart", session["cart"] + b"y", ttl=60))
    facts = log.facts()
    (cart,) = facts["written"]
    assert (cart["bytes_before"], cart["bytes"], cart["expires_in"]) == (30_000, 30_001, 60.0)
    assert [call["operation"] for call in facts["calls"]].count("read_frame") == 1
    visitor.run(lambda session: session.update(cart=["mug"]))
    (cart,) = log.facts()["written"]
    assert cart["bytes_before"] == 30_001
    assert "large" not in cart


def test_the_round_trips_are_those_that_the_server_sees(debugged: Site, log: Log) -> None:
    visitor = debugged.visitor()
    visitor.run(fill)
    servers = debugged.url.startswith(("redis", "mongodb"))
    for view in (
        dict,
        lambda session: session.update(user_id=8),
        lambda session: session.rotate(),
        lambda session: session.destroy(),
    ):
        with debugged.counted() as count:
            visitor.run(view)
        facts = log.facts()
        if not servers:  # a call of these is no round trip
            assert facts["round_trips"] == 0
            assert {call["round_trips"] for call in facts["calls"]} == {None}
        elif count.commands is not None:  # nobody else uses that server
            assert facts["round_trips"] == count.trips


def test_an_untouched_session_is_one_line(debugged: Site, log: Log) -> None:
    visitor = debugged.visitor()
    visitor.run(fill)
    with debugged.counted() as count:
        response = visitor.get("/untouched")
    assert count.trips == 0
    assert "Vary" not in response.headers
    assert "Server-Timing" not in response.headers
    assert log.text() == "Session after GET /untouched: not looked at"
    visitor.get("/nowhere")
    assert log.text() == "Session after GET (no route): not looked at"


def test_server_timing_has_the_share_of_the_session(debugged: Site, log: Log) -> None:
    visitor = debugged.visitor()
    visitor.run(fill)
    header = visitor.ask(lambda session: session.update(user_id=8)).headers["Server-Timing"]
    found = re.fullmatch(r'gsession;dur=([0-9]+\.[0-9]{2});desc="2 store calls"', header)
    assert found is not None
    assert float(found[1]) == pytest.approx(log.facts()["ms"], abs=0.01)


# -- why a token leads to no session


def refused(visitor: Visitor, log: Log) -> tuple[str, str]:
    assert visitor.run(dict) == {}
    facts = log.facts()
    assert facts["state"] == "no session"
    assert facts["cookie"].startswith("unchanged: there is no such session")
    assert facts["events"][0].startswith("SessionRefused(")
    found = facts["refused"]
    assert f"  refused    {found['reason']}" in log.text()
    return found["reason"], found["because"]


def test_why_a_token_is_refused(make_site: SiteMaker, clock: FakeClock, log: Log) -> None:
    site = make_site(debug=True)
    short = make_site(debug=True, absolute_timeout=3600)

    def stored(site: Site = site) -> Visitor:
        visitor = site.visitor()
        visitor.run(fill)
        return visitor

    gone = (
        "unknown",
        "not in the store: logged out, revoked, never issued, or expired and removed",
    )
    visitor = stored()
    visitor.another_tab().run(lambda session: session.destroy())
    assert refused(visitor, log) == gone

    visitor, tab = (first := stored()), first.another_tab()
    tab.run(lambda session: session.rotate(grace=0))
    assert refused(visitor, log) == gone

    visitor, tab = (first := stored()), first.another_tab()
    tab.run(lambda session: session.rotate())
    after = session_key(tab.token)
    old = visitor.another_tab()
    clock.advance(11)
    over = f"rotated, and the grace period is over; the session continues as {after}"
    assert refused(old, log) == ("unknown", over)

    visitor, tab = (first := stored()), first.another_tab()
    tab.run(lambda session: session.rotate())
    site.store.store.delete(session_key(tab.token))
    ended = ("unknown", "the session was rotated, and has ended since")
    assert refused(visitor, log) == ended

    visitor = stored()
    record = site.store.store.load(session_key(visitor.token))
    assert record is not None
    broken = record._replace(payload=record.payload[:-1] + b"?", version=new_version())
    site.store.store.save(broken, record.version)
    assert refused(visitor, log) == ("corrupt", "checksum mismatch")

    idle, absolute = stored(), stored(short)
    clock.advance(7261)
    because = "it wasn't used within its idle timeout"
    assert refused(idle, log) == ("expired", because)
    assert refused(absolute, log) == ("expired", "it reached its absolute timeout")
    assert [call["operation"] for call in log.facts()["calls"]] == ["load"]


def a_cookie_of(site: Any) -> Any:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    return visitor.cookie


def test_why_a_cookie_is_refused_before_the_store_is_asked(in_memory: Any, log: Log) -> None:
    site = in_memory()
    assert refused(site.visitor("nonsense"), log) == ("malformed", "")
    assert log.facts("before")["found"] == "a cookie that was refused: malformed"
    assert refused(site.visitor("nonsense." + "A" * 22), log) == ("bad signature", "")
    assert log.facts()["calls"] == []
    visitor = site.app.test_client(use_cookies=False)
    visitor.site = site
    one, two = (a_cookie_of(site) for _ in range(2))
    visitor.run(dict, headers={"Cookie": f"session={one}; session={two}"})
    assert log.facts()["refused"]["reason"] == "two cookies"


# -- what goes wrong


def outage() -> None:
    raise StoreUnavailable("injected")


def test_the_dump_shows_an_outage(debugged: Site, log: Log) -> None:
    visitor = debugged.visitor()
    visitor.run(fill)
    debugged.store.before("load", outage)
    assert visitor.ask(dict).status_code == 503
    facts = log.facts()
    assert (facts["state"], facts["status"]) == ("could not be loaded", 503)
    assert facts["calls"][0]["result"] == "StoreUnavailable"
    debugged.store.before("save", outage)
    assert visitor.ask(lambda session: session.update(user_id=8)).status_code == 503
    facts = log.facts()
    assert facts["failure"] == "StoreUnavailable"
    assert facts["not_stored"] == ["user_id"]
    assert facts["written"] == []
    assert "WriteDropped(reason='store unavailable')" in facts["events"]


def test_the_dump_shows_a_conflict(make_site: SiteMaker, log: Log) -> None:
    site = make_site(debug=True, merge_policies={"user_id": "reject"})
    visitor = site.visitor()
    visitor.run(fill)
    tab = visitor.another_tab()
    site.before_a_write(lambda: tab.run(lambda session: session.update(user_id=8)))
    assert visitor.ask(lambda session: session.update(user_id=9)).status_code == 409
    facts = log.facts()
    assert facts["events"] == ["SessionConflicted(reason='refused')"]
    assert facts["not_stored"] == ["user_id"]
    assert [call["result"] for call in facts["calls"]] == ["ok", "Stale", "ok"]


def test_the_dump_shows_a_merge(debugged: Site, log: Log) -> None:
    visitor = debugged.visitor()
    visitor.run(fill)
    tab = visitor.another_tab()
    debugged.before_a_write(lambda: tab.run(lambda session: session.update(user_id=8)))
    visitor.run(lambda session: session["cart"].append("pen"))
    facts = log.facts()
    assert "conflicts=1" in facts["events"][0]
    assert [call["operation"] for call in facts["calls"]] == ["load", "save", "load", "save"]
    assert names(facts["written"]) == ["cart"]


def test_the_dump_shows_a_session_that_ended_during_the_request(debugged: Site, log: Log) -> None:
    visitor = debugged.visitor()
    visitor.run(fill)
    tab = visitor.another_tab()
    debugged.before_a_write(lambda: tab.run(lambda session: session.destroy()))
    visitor.run(lambda session: session.update(user_id=9))
    facts = log.facts()
    assert facts["state"] == "ended by another request"
    assert facts["not_stored"] == ["user_id"]
    assert facts["cookie"] == "unchanged: the request that ended the session deletes it"


def test_the_dump_shows_a_refused_value(in_memory: Any, log: Log) -> None:
    site = in_memory(max_bytes=300)
    visitor = site.visitor()
    visitor.run(fill)
    site.app.config["PROPAGATE_EXCEPTIONS"] = False
    assert visitor.ask(lambda session: session.update(big="x" * 400)).status_code == 500
    facts = log.facts()
    assert (facts["status"], facts["failure"]) == (500, "SessionTooLarge")
    assert facts["not_stored"] == ["big"]


@pytest.mark.parametrize("where", ["view", "save"])
def test_the_dump_shows_an_error_of_the_application(in_memory: Any, log: Log, where: str) -> None:
    """As in debug mode: Flask does not come to save the session, or is stopped there."""
    site = in_memory(max_bytes=300)
    site.app.testing = True
    visitor = site.visitor()
    visitor.run(fill)

    def view(session: Any) -> None:
        session["big"] = "x" * 400
        if where == "view":
            raise ZeroDivisionError("in the view")

    with pytest.raises(Exception, match=r"in the view|SESSION_MAX_BYTES"):
        visitor.ask(view)
    facts = log.facts()
    assert facts["error"] == ("ZeroDivisionError" if where == "view" else "SessionTooLarge")
    assert facts["not_stored"] == ["big"]
    assert facts["cookie"].startswith("not sent: an error ended the request")
    assert len(log.records()) == 2


# -- cookies


def test_why_a_cookie_is_sent_or_not(in_memory: Any, log: Log, clock: FakeClock) -> None:
    site = in_memory(absolute_timeout=90 * 86400)
    visitor = site.visitor()

    def cookie(view: Callable[[Any], object], visitor: Visitor = visitor) -> str:
        response = visitor.ask(view)
        facts = log.facts()
        assert ("Set-Cookie" in response.headers) == facts["cookie"].startswith(
            ("set:", "deleted:")
        )
        return str(facts["cookie"])

    assert cookie(dict) == "none: nothing is stored"
    assert cookie(fill) == "set: the session is new"
    assert cookie(dict) == "unchanged: the client has it"
    late = visitor.another_tab()
    assert cookie(lambda session: session.rotate()) == "set: the session has a new token"
    assert (
        cookie(dict, late) == "unchanged: the request that rotated the session sends the new token"
    )
    assert log.facts()["state"] == "loaded, rotated by another request"

    def stay(session: Any) -> None:
        session.permanent = True

    assert cookie(stay) == "set: its expiry moved"
    clock.advance(3600)
    assert cookie(dict) == "set: its expiry moved"
    site.app.config.update(SECRET_KEY="another", SECRET_KEY_FALLBACKS=["a key for tests"])
    assert cookie(dict) == "set: signed with the current SECRET_KEY"
    assert log.facts("before")["found"].endswith(", signed with a fallback key")
    assert cookie(lambda session: session.destroy()) == "deleted: the session ended"
    assert log.facts()["state"] == "ended"
    assert cookie(fill) == "set: the session is new"
    assert cookie(lambda session: session.clear()) == "deleted: the session ended"


def test_a_token_in_a_header(in_memory: Any, log: Log) -> None:
    site = in_memory(token_header="X-Session")
    visitor = site.visitor()
    token = visitor.ask(fill, headers={"X-Session": ""}).headers["X-Session"]
    assert log.facts()["header"] == "set: the session is new"
    visitor.run(dict, headers={"X-Session": token})
    assert log.facts("before")["found"].startswith("a header for ")
    assert log.facts()["header"] == "unchanged: the client has it"
    visitor.run(lambda session: session.destroy(), headers={"X-Session": token})
    assert log.facts()["header"] == "deleted: the session ended"
    assert visitor.ask(dict, headers={"X-Session": token}).headers["X-Session"] == ""
    assert log.facts()["header"] == "emptied: there is no such session"


# -- the parts of a session


def test_writes_at_once_are_dumped(debugged: Site, log: Log) -> None:
    visitor = debugged.visitor()
    visitor.run(fill)

    def view(session: Any) -> None:
        session.update_atomic("visits", lambda count: (count or 0) + 1)
        session.take("user_id")

    visitor.run(view)
    facts = log.facts()
    assert names(facts["written"]) == ["visits"]
    assert facts["deleted"] == ["user_id"]
    assert [call["operation"] for call in facts["calls"]] == ["load", "save", "save"]


def test_locks_are_dumped(debugged: Site, log: Log) -> None:
    visitor = debugged.visitor()
    visitor.run(fill)

    def view(session: Any) -> None:
        with session.lock():
            session["user_id"] += 1

    visitor.run(view)
    facts = log.facts()
    operations = [call["operation"] for call in facts["calls"]]
    assert [name for name in operations if name != "load"] == ["acquire", "save", "release"]
    assert facts["events"][0].startswith("LockAcquired(")


def test_a_transaction_that_is_rolled_back_stores_nothing(in_memory: Any, log: Log) -> None:
    visitor = in_memory().visitor()
    visitor.run(fill)

    def view(session: Any) -> None:
        with pytest.raises(ZeroDivisionError), session.transaction():
            session["user_id"] = 1 / 0

    visitor.run(view)
    facts = log.facts()
    assert (facts["written"], facts["not_stored"]) == ([], [])


def test_both_sessions_of_an_application_are_dumped(in_memory: Any, log: Log) -> None:
    site = in_memory()
    admin = Session(site.app, store=site.store, cookie_name="admin", debug=True)
    site.visitor().run(lambda session: (fill(session), admin.session.update(user=1)))
    found = {record.gsession["cookie_name"]: record.gsession for record in log.records()}  # type: ignore[attr-defined]
    assert names(found["session"]["written"])[0] == "cart"
    assert names(found["admin"]["written"]) == ["user"]
    assert len(log.records("before")) == 2


def test_many_keys_are_cut(in_memory: Any, log: Log) -> None:
    in_memory().visitor().run(lambda session: session.update({str(n): n for n in range(100)}))
    assert len(log.facts()["written"]) == 30


def test_values_are_hidden_unless_they_are_declared(in_memory: Any, log: Log) -> None:
    site = in_memory(debug_show=["cart", "password", "photo"])
    values = {"cart": {"sku": 1, "token": "canary"}, "password": "canary", "photo": b"canary"}
    site.visitor().run(lambda session: session.update(values, other="canary"))
    assert "canary" not in log.text()
    shown = {about["key"]: about.get("value") for about in log.facts()["written"]}
    assert shown["cart"] == "{'sku': 1, 'token': <hidden>}"
    assert (shown["password"], shown["photo"], shown["other"]) == (None, None, None)


def test_a_dump_that_fails_does_no_harm(
    in_memory: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("of the dump")

    site = in_memory()
    monkeypatch.setattr("flask_gsession.watching.debug.facts_of", fail)
    monkeypatch.setattr("flask_gsession.watching.debug._describe_token", fail)
    site.visitor().run(fill)
    assert caplog.text.count("A debug dump failed") == 2


def test_the_log_is_made_to_get_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even without any logging set up, as with `flask run --debug`."""
    logger = logging.getLogger("flask_gsession.debug")
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    app = Flask(__name__)
    app.debug = True
    app.config.update(SECRET_KEY="a key for tests", SESSION_STORE="memory://")
    Session(app)
    app.add_url_rule("/", view_func=lambda: session.get("user") or "nobody")
    app.test_client().get("/")
    assert "DEBUG in debug: Session after GET / -> 200: no session" in capsys.readouterr().err


# -- one session of an application that is not debugged


def order(site: Site, *words: str) -> str:
    """The output of `flask gsession debug`."""
    result = site.app.test_cli_runner().invoke(gsession, ["debug", *words])
    return result.stdout if result.exit_code == 0 else f"{result.exit_code}: {result.output}"


def record_of(site: Site, visitor: Visitor) -> Record:
    record = site.store.store.load(session_key(visitor.token))
    assert record is not None
    return record


def test_one_session_is_debugged(
    make_site: SiteMaker, clock: FakeClock, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()
    in_memory = site.url.startswith("memory")
    worker = make_site(store=site.store) if in_memory else make_site()
    visitor, other = site.visitor(), site.visitor()
    visitor.run(fill)
    other.run(fill)
    before = record_of(site, visitor)
    assert order(site, before.key).startswith(f"{before.key}: requests are logged until ")
    after = record_of(site, visitor)
    assert after._replace(payload=b"", version=0) == before._replace(payload=b"", version=0)

    tab = worker.visitor(visitor.cookie)
    with worker.counted() as count:
        assert tab.run(dict)["cart"] == ["mug"]
    assert len(count.calls) == 1
    (record,) = log.records()
    assert (record.levelname, log.facts()["state"]) == ("INFO", "loaded")
    assert names(log.facts()["read"]) == ["cart", "user_id", "old", "hint"]
    assert [call["operation"] for call in log.facts()["calls"]] == ["load"]
    response = tab.ask(lambda session: session.update(user_id=8))
    assert "Server-Timing" not in response.headers
    assert names(log.facts()["written"]) == ["user_id"]
    assert log.records("before") == []

    caplog.clear()
    other.run(dict)
    other.run(lambda session: session.update(user_id=8))
    tab.get("/untouched")
    assert log.records() == []

    tab.run(lambda session: session.rotate())
    tab.run(dict)
    assert log.facts()["handle"] == session_key(tab.token)
    clock.advance(601)
    caplog.clear()
    tab.run(lambda session: session.update(user_id=9))
    assert log.records() == []
    found = site.ext._interface(site.app).repository.find(session_key(tab.token))
    assert found is not None
    assert found.body.debug_until is None


@pytest.mark.parametrize("look", [True, False], ids=["loaded", "not-loaded"])
def test_a_logout_is_logged_by_order(make_site: SiteMaker, log: Log, look: bool) -> None:
    site = make_site()
    visitor = site.visitor()
    visitor.run(fill)
    handle = record_of(site, visitor).key
    order(site, handle)

    def logout(session: Any) -> None:
        if look:
            session.get("cart")
        session.destroy()

    visitor.run(logout)
    (record,) = log.records()
    facts = log.facts()
    assert (record.levelname, facts["state"], facts["handle"]) == ("INFO", "ended", handle)
    assert [call["operation"] for call in facts["calls"]] == [*["load"] * look, "delete"]
    assert f"  handle     {handle}\n" in record.getMessage()
    assert site.stored() == {}


def test_an_order_and_a_write_at_once_both_stand(make_site: SiteMaker, log: Log) -> None:
    site = make_site(encryption_keys="x" * 43)
    visitor = site.visitor()
    visitor.run(fill)
    handle = session_key(visitor.token)

    said: list[str] = []
    site.before_a_write(lambda: said.append(order(site, handle)))
    visitor.run(lambda session: session.update(user_id=8))
    assert said[0].startswith(f"{handle}: requests are logged until")
    assert visitor.run(dict)["user_id"] == 8
    assert len(log.records()) == 1

    tab = visitor.another_tab()
    site.before_a_write(lambda: tab.run(lambda session: session.update(user_id=9)))
    assert order(site, handle, "--off") == f"{handle}: requests are no longer logged\n"
    logged = len(log.records())
    assert visitor.run(dict)["user_id"] == 9
    assert len(log.records()) == logged

    site.before_a_write(lambda: tab.run(lambda session: session.rotate()))
    assert order(site, handle).startswith(
        f"{session_key(tab.token)} (rotated from {handle}): requests are logged until "
    )
    assert tab.run(dict)["user_id"] == 9
    assert len(log.records()) == logged + 1

    site.before_a_write(lambda: tab.run(lambda session: session.destroy()))
    assert "no such session" in order(site, session_key(tab.token))
    assert visitor.run(dict) == {}


def test_handles_that_the_command_refuses(
    make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    visitor = site.visitor()
    visitor.run(fill)
    handle = session_key(visitor.token)
    for unknown in ("A" * 43, "-" + "B" * 42, "--" + "C" * 41):
        said = f"1: Error: {unknown}: no such session; it may have ended"
        assert order(site, unknown).startswith(said)
    assert "is not a handle" in order(site, "nonsense!")
    for time in ("0", "90", "25h", "-1", "1.5h", "ten", "10 m"):
        assert order(site, handle, "--for", time).startswith("2: ")
    for time in ("90s", "30s", "10m", "24h", "1d"):
        assert order(site, handle, "--for", time).startswith(
            f"{handle}: requests are logged until "
        )
    failed = "1: Error: session: the store failed: injected\n"
    site.store.before("load", outage)
    assert order(site, handle) == failed
    site.store.after("save", outage)
    assert order(site, handle) == failed
    monkeypatch.setattr("flask_gsession.repository.races.ATTEMPTS", 1)
    tab = visitor.another_tab()
    site.before_a_write(lambda: tab.run(lambda session: session.update(user_id=9)))
    assert "could not change the session: 409 Conflict: Another request changed" in order(
        site, handle
    )


def test_the_session_of_one_of_several_cookies(in_memory: Any, clock: FakeClock, log: Log) -> None:
    site = in_memory()
    admin = Session(site.app, store="memory://", cookie_name="admin", clock=clock)
    visitor = site.visitor()
    visitor.run(lambda _: admin.session.update(user=1))
    handle = visitor.run(lambda _: admin.session.handle)
    assert "Choose a session: --session session | admin" in order(site, handle)
    assert "no such session" in order(site, handle, "--session", "session")
    assert f"{handle}: requests are logged until" in order(site, handle, "--session", "admin")


def test_nothing_is_traced_without_debug(site: Site, log: Log) -> None:
    visitor = site.visitor()
    response = visitor.ask(fill)
    visitor.run(lambda session: session["cart"].append(1))
    assert log.records() == log.records("before") == []
    assert "Server-Timing" not in response.headers


# -- nothing leaks

TOKEN = "CanaryOfTheToken"
SECRET = "canary-of-the-secret"


class Everything(logging.Handler):
    """All that is logged, by anybody, with what hangs on it."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.setFormatter(logging.Formatter())
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        facts = getattr(record, "gsession", "")
        self.heard.append(f"{record.name}: {self.format(record)} {facts}")


@pytest.fixture
def everything() -> Iterator[Everything]:
    handler = Everything()
    level = logging.root.level
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.DEBUG)
    yield handler
    logging.root.removeHandler(handler)
    logging.root.setLevel(level)


def forms(canary: str) -> list[str]:
    """A text as it is, in hex, and inside of any base64."""
    data = canary.encode()
    found = [canary, data.hex()]
    for shift in range(3):
        # Whole groups of three bytes only, which no neighbour changes.
        inner = data[shift : shift + (len(data) - shift) // 3 * 3]
        found.append(base64.b64encode(inner).decode())
    return found


@pytest.mark.parametrize("how", ["debug", "by order"])
def test_no_canary_is_logged(make_site: SiteMaker, everything: Everything, how: str) -> None:
    """A login, errors, outages, conflicts and a corrupt record, with all logging at DEBUG."""
    numbers = itertools.count()
    site = make_site(
        debug=how == "debug",
        debug_show=["note", "password", "photo"],
        token_factory=lambda: f"{TOKEN}{next(numbers):08}",
        token_header="X-Session",
        merge_policies={"stock": "reject"},
    )
    registry = CollectorRegistry()
    SessionMetrics(site.app, ext=site.ext, registry=registry)
    heard = everything.heard

    def ask(visitor: Visitor, view: Callable[[Any], object], status: int = 200) -> None:
        response = visitor.ask(view)
        assert response.status_code == status
        heard.extend(f"{name}: {value}" for name, value in response.headers if name != "Set-Cookie")
        heard.append(response.text)

    def log_in(session: Any) -> None:
        session.update(password=SECRET, user=SECRET, stock=1, list=[SECRET], photo=SECRET.encode())
        session["note"] = {"api_key": SECRET, "raw": SECRET.encode()}
        session.set("once", SECRET, ttl=60)
        session.rotate(grace=0)

    def fail(session: Any) -> None:
        session.get("user")
        heard.extend(
            [
                repr(session),
                repr(session._repository.settings),
                repr(session._presented),
            ]
        )
        raise ZeroDivisionError

    def refuse(session: Any) -> None:
        session["user"] = [SECRET, object()]

    def too_large(session: Any) -> None:
        session.update({str(number): SECRET * 700 for number in range(100)})

    visitor = site.visitor()
    ask(visitor, log_in)
    if how == "by order":
        assert "logged until" in order(site, session_key(visitor.token))
    ask(visitor, log_in)
    ask(visitor, lambda session: dict(session) and None)
    for view in (fail, refuse, too_large):
        ask(visitor, view, 500)
    tab = visitor.another_tab()
    site.before_a_write(lambda: tab.run(lambda session: session.update(stock=2)))
    ask(visitor, lambda session: session.update(stock=3), 409)
    for operation in ("load", "save"):
        site.store.before(operation, outage)
        ask(visitor, lambda session: session.update(user=SECRET + "2"), 503)
        site.store.after(operation, outage)
        ask(visitor, lambda session: session.update(user=SECRET + "3"), 503)
    ask(visitor, lambda session: session.update_atomic("user", lambda user: user + "!"))
    ask(visitor, lambda session: session.take("once"))
    with site.visit(lambda session: dict(session)) as visit:
        site.app.test_client().get(visit.path, headers={"X-Session": str(visitor.cookie)})
    record = record_of(site, visitor)
    broken = record._replace(payload=record.payload[:-1] + b"?", version=new_version())
    site.store.store.save(broken, record.version)
    ask(visitor, dict)
    site.visitor(f"{visitor.cookie}x").run(dict)
    heard.append(generate_latest(registry).decode())

    assert sum("Session after" in text for text in heard) > 10
    for form in (*forms(TOKEN), *forms(SECRET)):
        found = [text for text in heard if form in text]
        assert found == []


NOWHERE = {
    "sqlite": "sqlite:////dev/null/sessions.sqlite3",
    "redis": "redis://127.0.0.1:1/0",
    "mongodb": "mongodb://127.0.0.1:1/sessions",
}


@pytest.mark.parametrize("kind", NOWHERE)
def test_no_canary_is_logged_if_a_driver_fails(kind: str, everything: Everything) -> None:
    app = Flask(__name__)
    app.config.update(SECRET_KEY="a key for tests", SESSION_STORE=NOWHERE[kind])
    ext = Session(app, debug=True, store_timeout=0.1, token_factory=lambda: f"{TOKEN}01234567")
    statuses = []

    @app.get("/write")
    def write() -> str:
        session["user"] = SECRET
        return ""

    @app.get("/read")
    def read() -> str:
        return str(session.get("user"))

    client = app.test_client()
    statuses.append(client.get("/write").status_code)
    signed = TokenSigner(["a key for tests"], "session").sign(f"{TOKEN}01234567")
    client.set_cookie("session", signed)
    for path in ("/read", "/write"):
        response = client.get(path)
        statuses.append(response.status_code)
        everything.heard += [str(response.headers), response.text]
    assert statuses == [503, 503, 503]
    assert sum("Session after" in text for text in everything.heard) == 3
    for form in (*forms(TOKEN), *forms(SECRET)):
        assert [text for text in everything.heard if form in text] == []
    ext.close(app)


# -- beside the page


def test_the_panel_of_the_debug_toolbar() -> None:
    app = Flask(__name__)
    app.debug = True
    app.config.update(
        SECRET_KEY="a key for tests",
        SESSION_STORE="memory://",
        SESSION_DEBUG_SHOW=["cart"],
        DEBUG_TB_PANELS=["flask_gsession.contrib.debugtoolbar.SessionPanel"],
        DEBUG_TB_INTERCEPT_REDIRECTS=False,
    )
    ext = Session(app)
    DebugToolbarExtension(app)

    @app.post("/cart")
    def fill_cart() -> Any:
        session["cart"] = ["<mug>"]
        session["user"] = "canary"
        return redirect("/cart")

    @app.get("/cart")
    def cart() -> str:
        session["seen"] = len(session["cart"])
        return "<html><body>the cart</body></html>"

    @app.get("/plain")
    def plain() -> str:
        return "<html><body>untouched</body></html>"

    client = app.test_client()
    text = client.post("/cart", follow_redirects=True).text
    now, _, before = text.partition("Earlier requests")
    assert "GET /cart: loaded" in now
    assert "pending    seen" in now
    assert "POST /cart -&gt; 302: new" in before
    assert "written    cart: list, 7 bytes, [&#39;&lt;mug&gt;&#39;]" in before
    assert "canary" not in text
    assert "<mug>" not in text
    assert client.get("/cart").text.count("written    seen: int, 1 byte") == 1
    response = client.get("/plain")
    assert "GET /plain: not looked at" in response.text
    assert "Vary" not in response.headers
    for _ in range(30):
        client.get("/cart")
    assert client.get("/plain").text.count("Session") < 100
    assert len(app.extensions["gsession-debug"]) == 20
    ext.close(app)


def test_the_panel_of_an_application_that_is_not_debugged() -> None:
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY="a key for tests",
        SESSION_STORE="memory://",
        DEBUG_TB_ENABLED=True,
        DEBUG_TB_PANELS=["flask_gsession.contrib.debugtoolbar.SessionPanel"],
    )
    Session(app)
    DebugToolbarExtension(app)
    app.add_url_rule("/", view_func=lambda: "<html><body></body></html>")
    assert "SESSION_DEBUG is off" in app.test_client().get("/").text
