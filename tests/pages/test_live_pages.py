"""Live updates: the stream, the state to poll, and the script."""

from __future__ import annotations

import gc
import html
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Response, render_template_string

from flask_gsession.errors import SessionEnded, SettingError, StoreUnavailable
from flask_gsession.live import hints as hints_module
from flask_gsession.live.live import Change
from flask_gsession.live.messages import LIFE, MOST_MESSAGES
from flask_gsession.live.streams import HEARTBEAT, slots
from flask_gsession.pages import live as page
from flask_gsession.pages.live import live_blueprint
from tests.harness.apps import Site, SiteMaker, Visitor, until

STREAMS = {"wsgi.multithread": True, "werkzeug.socket": True}  # as of Flask's own server


class Events:
    """A browser's `EventSource`."""

    def __init__(self, visitor: Visitor, path: str = "/live/stream", **headers: str) -> None:
        self.response = visitor.get(path, environ_overrides=STREAMS, headers=headers)
        assert self.response.status_code == 200, self.response.text
        self._parts: Iterator[bytes] = iter(self.response.response)
        self._events: deque[Any] = deque()

    def __iter__(self) -> Events:
        return self

    def __next__(self) -> Any:
        while not self._events:
            part = next(self._parts)
            for event in part.decode().split("\n\n")[:-1] if part != HEARTBEAT else ():
                fields = dict(line.split(": ", 1) for line in event.splitlines())
                self._events.append(json.loads(fields["data"]))
        return self._events.popleft()

    def close(self) -> None:
        self.response.close()


@pytest.fixture
def make_live(make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch) -> Iterator[SiteMaker]:
    """Makes sites on each store whose pages may hear of the cart. MongoDB is polled often."""
    monkeypatch.setattr("flask_gsession.stores.mongodb.changes._POLL", 0.1)
    sites = []

    def make(**settings: Any) -> Site:
        site = make_site(**settings)
        site.app.register_blueprint(live_blueprint(keys=["cart"], user_keys=["theme"]))
        sites.append(site)
        return site

    yield make  # type: ignore[misc]  # it is called like one
    for site in sites:
        site.ext.close(site.app)
    gc.collect()
    assert len(slots) == 0


@pytest.fixture
def live(make_live: SiteMaker) -> Site:
    return make_live()


@pytest.fixture
def in_memory(make_live: SiteMaker) -> Site:
    """Like the other fixture, for code that doesn't depend on the store."""
    return make_live()


of_memory = pytest.mark.parametrize("store_url", ["memory://"])


def test_a_stream_follows_a_session_to_its_end(live: Site) -> None:
    visitor = live.visitor()
    visitor.run(lambda session: session.update(cart=["a"], secret="s"))
    live.clock.advance(3600)  # a request would renew it
    before = live.stored()
    events = Events(visitor)
    first = next(events)
    assert first == {"who": "", "keys": {"cart": first["keys"]["cart"]}}
    assert visitor.get("/live/state").json.items() >= first.items()
    assert live.stored() == before
    visitor.run(lambda session: session.update(secret="t"))  # no page may hear of that
    visitor.run(lambda session: session["cart"].append("b"))
    second = next(events)
    assert second["keys"]["cart"] != first["keys"]["cart"]
    visitor.run(lambda session: session.destroy())
    assert next(events) == {"who": None}
    assert list(events) == []
    assert visitor.get("/live/state").json["who"] is None


def test_a_user_gets_devices_messages_and_revocations(live: Site) -> None:
    here, there = live.visitor(), live.visitor()
    here.run(lambda session: session.bind("ada"))
    events = Events(here)
    first = next(events)
    there.run(lambda session: session.bind("ada"))
    second = next(events)
    assert second["devices"] != first["devices"]
    assert second["who"] == first["who"] == there.get("/live/state").json["who"] != ""
    there.run(lambda session: session.shared.update(theme="dark", other=1))
    third = next(events)
    assert third == {**second, "user": {"theme": third["user"]["theme"]}}
    there.run(lambda session: session.shared.update(theme="light"))
    second = next(events)
    assert second["user"]["theme"] != third["user"]["theme"]
    with live.app.app_context():
        live.ext.live.publish("ada", "order", {"id": 7})
        live.ext.live.publish("bob", "order", {"id": 8})
        live.ext.live.publish("ada", "order")
    messages = [next(events), next(events)]
    ids = [message["id"] for message in messages]
    assert messages == [
        {"id": ids[0], "name": "order", "data": {"id": 7}},
        {"id": ids[1], "name": "order", "data": None},
    ]
    assert ids[0] < ids[1]
    state = here.get(f"/live/state?after={ids[0]}").json
    assert (state["messages"], state["last"]) == (messages[1:], ids[1])
    again = Events(here, **{"Last-Event-ID": str(ids[0])})  # the browser reconnects
    assert [next(again), next(again)] == [second, messages[1]]
    assert here.get("/live/state").json["messages"] == []  # a new page starts with the next one
    with live.app.app_context():
        live.ext.users.revoke_all("ada")
    assert list(events)[-1] == list(again)[-1] == {"who": None}
    live.clock.advance(LIFE / 1000 + 1)
    there.run(lambda session: session.bind("ada"))
    assert there.get("/live/state?after=0").json["messages"] == []


def test_functions_are_called_in_a_process_that_watches(live: Site) -> None:
    changes: list[Change] = []
    everything: list[Change] = []
    slow = threading.Event()

    @live.ext.live.on_change("cart")
    def cart_changed(change: Change) -> None:
        with live.ext.open(change.handle, renew=False) as session:  # in an application context
            assert "cart" in session
        changes.append(change)
        raise ValueError("a mistake")

    @live.ext.live.on_change()
    def changed(change: Change) -> None:
        everything.append(change)
        slow.wait(30)

    visitor, other = live.visitor(), live.visitor()
    visitor.run(lambda session: session.update(cart=[], other=1))
    other.run(lambda session: session.update(cart=[]))  # nobody watches it
    handle = visitor.run(lambda session: session.handle)
    with live.app.app_context():
        watch = live.ext.live.watch(handle)
    visitor.run(lambda session: session["cart"].append("a"))
    other.run(lambda session: session["cart"].append("a"))
    until(lambda: len(everything) == 1)
    assert changes == everything == [Change(handle, None, frozenset({"cart"}))]
    visitor.run(lambda session: session.update(other=2))
    rotated = visitor.run(lambda session: [session.rotate(), session.handle][1])
    until(lambda: watch.state.session is not None and watch.state.session.handle != handle)
    visitor.run(lambda session: session.update(late=2))
    until(lambda: watch.state.session is not None and "late" in watch.state.session.keys)
    slow.set()
    visitor.run(lambda session: session.destroy())
    until(lambda: everything[-1].ended)
    assert len(changes) == 1
    assert set().union(*(change.keys for change in everything)) == {"cart", "other", "late"}
    assert rotated == handle
    watch.close()
    with live.app.app_context(), pytest.raises(SessionEnded):
        live.ext.live.watch(handle)


def test_a_change_while_a_watch_begins_is_not_missed(
    live: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after the record was loaded, and before that state is kept."""
    monkeypatch.setattr(hints_module, "POLL", 600)
    visitor, first = live.visitor(), live.visitor()
    for each in (visitor, first):
        each.run(lambda session: session.update(cart=["a"]))
    with live.app.app_context():
        live.ext.live.hints().heartbeat = 600
        # With a watch before it, the listener hears already.
        early = live.ext.live.watch(first.run(lambda session: session.handle))
        state = early.state
        first.run(lambda session: session["cart"].append("b"))
        until(lambda: early.state != state)
        handle = visitor.run(lambda session: session.handle)
        tab = visitor.another_tab()
        live.store.after("load", lambda: tab.run(lambda session: session["cart"].append("b")))
        watch = live.ext.live.watch(handle)
    now = visitor.get("/live/state").json["keys"]
    until(lambda: watch.state.session is not None and watch.state.session.keys == now)
    watch.close()


def test_missed_changes_are_found_at_the_next_check(
    live: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints_module._ChangedRecords, "changed", lambda *_: None)
    monkeypatch.setattr(hints_module._ChangedRecords, "lost", lambda *_: None)
    monkeypatch.setattr(hints_module, "POLL", 0.1)
    monkeypatch.setattr(hints_module, "_TICK", 0.05)
    with live.app.app_context():
        live.ext.live.hints().heartbeat = 0.1
    visitor = live.visitor()
    visitor.run(lambda session: session.update(cart=["a"]))
    events = Events(visitor)
    next(events)
    live.store.before("load", outage)
    visitor.run(lambda session: session.update(cart=["b"]), headers={})
    assert next(events)["keys"]["cart"]
    live.clock.advance(86400 * 31)  # nothing reports an expiry everywhere
    assert next(events) == {"who": None}


def outage() -> None:
    if threading.current_thread().name == "gsession-live":
        raise StoreUnavailable("for a moment")


@of_memory
def test_a_rotation_ends_the_stream_and_an_old_token_gets_a_short_one(
    make_live: SiteMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_live(rotation_grace=10)
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["a"]))
    old = visitor.another_tab()
    events = Events(visitor)
    first = next(events)
    visitor.run(lambda session: session.rotate())
    assert list(events) == []  # the browser comes again
    lives = []
    stream = page.Stream
    monkeypatch.setattr(
        page, "Stream", lambda *args, **kw: [lives.append(kw["life"]), stream(*args, **kw)][1]
    )
    for tab in (visitor, old):
        events = Events(tab)
        assert next(events) == first  # a rotation changes no value
        events.close()
    assert lives == [300, 10]


@of_memory
def test_a_stream_ends_by_itself(make_live: SiteMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_live(live_heartbeat=1)
    made = []
    stream = page.Stream
    monkeypatch.setattr(
        page, "Stream", lambda *args, **kw: made.append(stream(*args, **kw)) or made[0]
    )
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["a"]))
    events = Events(visitor)
    next(events)
    assert next(events._parts) == HEARTBEAT  # it finds clients that are gone
    made[0]._until = 0  # its lifetime is over
    assert list(events) == []
    made.clear()
    events = Events(visitor)
    next(events)
    monkeypatch.setattr(hints_module, "is_ending", lambda: True)
    assert list(events) == []
    monkeypatch.undo()
    events = Events(visitor)
    next(events)
    threading.Timer(0.1, site.ext.close, [site.app]).start()
    assert list(events) == []
    made.clear()


@of_memory
def test_requests_that_get_no_stream(make_live: SiteMaker) -> None:
    site = make_live(live_streams=3, live_user_streams=2)
    visitor, more = site.visitor(), [site.visitor(), site.visitor()]

    def refusal(status: int, visitor: Visitor = visitor, **headers: str) -> Any:
        answer = visitor.get("/live/stream", environ_overrides=STREAMS, headers=headers)
        assert answer.status_code == status
        assert answer.headers["Cache-Control"] == "no-store"
        return answer.json["error"], answer.headers.get("Retry-After")

    assert "no session" in refusal(401)[0]
    visitor.run(lambda session: session.bind("ada"))
    for headers in (
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://shop.example"},
        {"Origin": "null"},
    ):
        assert "origin" in refusal(403, **headers)[0]
    assert visitor.get("/live/state", headers={"Origin": "null"}).status_code == 403
    typed = {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}
    assert visitor.get("/live/state", headers=typed).status_code == 200
    assert visitor.get("/live/stream").status_code == 501  # a worker without threads
    streams = [
        Events(visitor, **{"Origin": "http://localhost"}),
        Events(visitor, **{"Sec-Fetch-Site": "same-origin", "Origin": "http://inner"}),
    ]
    error, retry = refusal(429)
    assert ("user" in error, retry) == (True, "30")
    for each in more:
        each.run(lambda session: session.bind("bob"))
    streams.append(Events(more[0]))
    error, retry = refusal(503, more[1])
    assert ("worker" in error, retry) == (True, "30")
    streams.pop().close()
    Events(more[1]).close()
    site.store.before("load", lambda: site.store.before("load", _down))
    with pytest.raises(AssertionError):
        Events(more[0])
    streams.clear()
    del error, retry


def _down() -> None:
    raise StoreUnavailable("for a moment")


def test_a_page_says_which_state_it_shows(live: Site) -> None:
    """So the script's first request finds later changes, but not the page's own."""
    visitor = live.visitor()

    def page(act: Callable[[Any], object] = bool, method: str = "GET") -> Any:
        def view(session: Any) -> Response:
            act(session)
            return Response(render_template_string("{{ live_state() }}"))

        answer = visitor.ask(view, method=method)
        assert "Cookie" in answer.headers["Vary"]
        return json.loads(html.unescape(answer.text) or "null")

    def change_elsewhere(session: Any) -> None:
        assert (session["cart"], session.shared["theme"]) == (["a"], "dark")
        tab.run(lambda session: session.update(cart=["b"]))
        tab.run(lambda session: session.shared.update(theme="light"))

    assert page() == {"who": None, "keys": {}, "last": 0}
    assert page(lambda session: session.update(cart=[])) == {
        "who": None,
        "keys": {"cart": None},
        "last": 0,
    }
    assert page(lambda session: session.bind("ada")) is None  # a page after a sign-in
    tab = visitor.another_tab()
    tab.run(lambda session: [session.update(cart=["a"]), session.shared.update(theme="dark")])
    look = tab.get("/live/state").json
    assert look.items() >= page().items()
    assert page(change_elsewhere).items() <= look.items()
    assert not look.items() >= page().items()
    own = page(lambda session: [session.update(cart=[]), session.shared.update(theme="blue")])
    assert (own["who"], own["keys"], own["user"]) == (
        look["who"],
        {"cart": None},
        {"theme": None},
    )
    assert page(method="POST") is None
    assert page(lambda session: [len(session), live.store.before("load", _down)]) is None


@of_memory
def test_a_token_in_a_header_is_enough(make_live: SiteMaker) -> None:
    site = make_live(token_header="X-Session")
    visitor = site.visitor()
    token = visitor.ask(lambda session: session.update(cart=["a"]), headers={"X-Session": ""})
    headers = {"X-Session": token.headers["X-Session"]}
    client = site.visitor()
    answer = client.get("/live/state", headers=headers)
    assert "cart" in answer.json["keys"]
    assert {"Cookie", "X-Session"} <= set(answer.headers["Vary"].split(", "))
    events = Events(client, **headers)
    assert "cart" in next(events)["keys"]
    assert "X-Session" in events.response.headers["Vary"]
    assert client.get("/live/state", headers={"X-Session": "forged"}).json["who"] is None


@of_memory
def test_the_state_is_cheap_to_poll(live: Site) -> None:
    nobody = live.visitor()
    with live.counted() as count:
        assert nobody.get("/live/state").json["who"] is None
    assert count.calls == []
    nobody.run(lambda session: session.update(cart=["a"]))
    with live.counted() as count:
        answer = nobody.get("/live/state")
    assert count.calls == ["load"]
    assert answer.headers["Cache-Control"] == "private, no-cache"
    assert "Cookie" in answer.headers["Vary"]
    assert answer.json["stream"] is False
    headers = {"If-None-Match": answer.headers["ETag"]}
    assert nobody.get("/live/state", headers=headers).status_code == 304
    nobody.run(lambda session: session.update(cart=["b"]))
    assert nobody.get("/live/state", headers=headers).status_code == 200
    assert nobody.get("/live/state?after=x", environ_overrides=STREAMS).json["stream"] is True


@of_memory
def test_a_hook_that_looks_at_the_session_prolongs_nothing(live: Site) -> None:
    live.app.before_request(lambda: live.ext.session.get("user") and None)
    visitor = live.visitor()
    visitor.run(lambda session: session.update(cart=["a"]))
    live.clock.advance(3600)
    before = live.stored()
    Events(visitor).close()
    visitor.get("/live/state")
    assert live.stored() == before
    visitor.run(lambda session: None)
    assert live.stored() != before


@of_memory
def test_versions_betray_no_values(live: Site) -> None:
    """Equal values of two sessions have different versions: nobody can guess and compare."""
    versions = []
    for _ in range(2):
        visitor = live.visitor()
        visitor.run(lambda session: session.update(cart=True))
        versions.append(visitor.get("/live/state").json["keys"]["cart"])
        live.clock.advance(1)
    assert versions[0] != versions[1]


@of_memory
def test_messages_are_limited_and_checked(live: Site) -> None:
    publish = live.ext.live.publish
    with live.app.app_context():
        for name in ("", "a b", "a" * 65, "ä", None, 7):
            with pytest.raises(ValueError, match="name of a message"):
                publish("ada", name)  # type: ignore[arg-type]
        loop: list[Any] = []
        loop.append(loop)
        for data in (object(), float("nan"), {1: {2}}, loop, "\ud800" * 2000):
            with pytest.raises(ValueError, match="data of the message 'n'"):
                publish("ada", "n", data)
        with pytest.raises(ValueError, match="at most 1024"):
            publish("ada", "n", "x" * 1023)
        with pytest.raises(ValueError, match="user_id"):
            publish("", "n")
        for number in range(MOST_MESSAGES + 8):
            publish("ada", "n", number)
    visitor = live.visitor()
    visitor.run(lambda session: session.bind("ada"))
    found = visitor.get("/live/state?after=0").json["messages"]
    assert [message["data"] for message in found] == [*range(8, MOST_MESSAGES + 8)]


@of_memory
def test_mistakes_in_the_program_are_named(make_site: SiteMaker) -> None:
    site = make_site()
    with pytest.raises(SettingError, match="lists of names"):
        live_blueprint(keys="cart")
    with pytest.raises(TypeError, match="names of keys"):
        site.ext.live.on_change(lambda change: None)  # type: ignore[arg-type]
    with site.app.app_context():
        for wrong in ({}, {"handle": "x" * 43, "user_id": "ada"}, {"handle": "x"}):
            with pytest.raises(ValueError, match="handle"):
                site.ext.live.watch(**wrong)


@of_memory
def test_a_server_without_background_threads_is_named_at_the_start(
    make_live: SiteMaker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As an older uWSGI without `enable-threads`."""
    monkeypatch.setattr("flask_gsession.processes.runs_threads", lambda: False)
    site = make_live()
    assert "browsers can't have streams, so they poll. Set enable-threads" in caplog.text
    site.ext.live.on_change("cart")
    assert "functions of ext.live.on_change are not called" in caplog.text


@of_memory
def test_the_script_is_small_and_kept_by_browsers(live: Site) -> None:
    answer = live.visitor().get("/live/live.js")
    assert answer.mimetype == "text/javascript"
    assert len(answer.data) < 4096
    answer.close()
    assert "max-age=3600" in answer.headers["Cache-Control"]
    assert "ETag" in answer.headers
    assert "Vary" not in answer.headers
