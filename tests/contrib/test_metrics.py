"""Metrics: the counts, the number of series, several processes; rules and dashboards."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import requests
from flask import Flask, session
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from prometheus_flask_exporter import PrometheusMetrics

from flask_gsession import Session, SettingError, StoreUnavailable
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.contrib.metrics_gathering import Gathering, observed
from flask_gsession.errors import TooManySessions, UnreadableRecord
from flask_gsession.events import CircuitClosed, CircuitOpened, LargeValueLost, SessionCreated
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.testing import FakeClock, HookedStore
from flask_gsession.tokens import session_key
from tests.harness.apps import Site, SiteMaker
from tests.harness.gunicorn import Gunicorn
from tests.harness.servers import RedisServer, free_port
from tests.harness.topologies import until

Figures = dict[str, float]
Read = Callable[[], Figures]

RULES = files("flask_gsession.contrib") / "prometheus-rules.yml"
DASHBOARD = files("flask_gsession.contrib") / "grafana-dashboard.json"


def parsed(text: str) -> Figures:
    """The figures of a page of metrics, by `name{label="value",...}`."""
    return {
        sample.name + str(dict(sorted(sample.labels.items())) or ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("gsession_") and not sample.name.endswith("_created")
    }


def read(app: Flask) -> Figures:
    return parsed(app.test_client().get("/metrics").text)


def figure(figures: Figures, name: str, **labels: str) -> float:
    return figures.get(f"gsession_{name}{dict(sorted(labels.items())) or ''}", 0.0)


@pytest.fixture
def counted(site: Site) -> Site:
    """A site on each store in turn, with metrics."""
    SessionMetrics(site.app, ext=site.ext)
    return site


def test_session_events_are_counted(counted: Site) -> None:
    visitor = counted.visitor()
    visitor.run(lambda session: session.update(cart=[1]))
    visitor.run(lambda session: session["cart"].append(2))
    visitor.run(lambda session: session.rotate())
    visitor.run(lambda session: session.destroy())
    counted.visitor("nonsense").run(dict)
    visitor.run(dict)
    figures = read(counted.app)
    for event, times in {"created": 1, "saved": 2, "rotated": 1, "destroyed": 1}.items():
        assert figure(figures, "sessions_total", event=event) == times, event
    assert figure(figures, "refused_total", reason="malformed") == 1
    assert figure(figures, "payload_bytes_count") == 2
    assert figure(figures, "operations_total", operation="create", status="ok") == 1
    assert figure(figures, "operations_total", operation="save", status="ok") == 1
    assert figure(figures, "operations_total", operation="replace", status="ok") == 1
    assert figure(figures, "operations_total", operation="delete", status="ok") == 1
    assert figure(figures, "operations_total", operation="load", status="ok") == 2
    assert figure(figures, "operation_duration_seconds_count", operation="load") == 2
    assert figure(figures, "request_seconds_count", endpoint="_do") == 4  # two asked nothing
    assert figure(figures, "store_up", session="session") == 1


def test_user_events_are_counted(make_site: SiteMaker) -> None:
    site = make_site(max_per_user=2, max_policy="refuse")
    SessionMetrics(site.app, ext=site.ext)
    first, second, third = (site.visitor() for _ in range(3))
    for visitor in (first, second):
        visitor.run(lambda session: session.bind("ada"))

    def sign_in(session: Any) -> None:
        with pytest.raises(TooManySessions):
            session.bind("ada")

    third.run(sign_in)
    first.run(lambda session: session.confirm())
    first.run(lambda session: site.ext.users.revoke_others())
    first.run(lambda session: session.destroy())
    figures = read(site.app)
    counted = {
        "signed_in": 2, "refused_full": 1, "limit_reached": 1, "confirmed": 1, "revoked": 1,
        "signed_out": 1, "bound": 0, "refused_revoked": 0,
    }  # fmt: skip
    for event, times in counted.items():
        assert figure(figures, "user_sessions_total", event=event) == times, event


def test_an_expired_session_is_a_figure_of_its_own(counted: Site) -> None:
    visitor, forgotten = counted.visitor(), counted.visitor()
    for each in (visitor, forgotten):
        each.run(lambda session: session.update(cart=[1]))
    counted.store.store.delete(session_key(forgotten.token))  # as a store does by itself
    counted.clock.advance(100 * 86400)
    for each in (visitor, forgotten):
        each.run(dict)
    figures = read(counted.app)
    assert figure(figures, "refused_total", reason="expired") == 1
    assert figure(figures, "refused_total", reason="unknown") == 1
    assert figure(figures, "operations_total", operation="load", status="ok") == 1
    assert figure(figures, "operations_total", operation="load", status="absent") == 1


def test_a_lost_large_value_is_counted(counted: Site) -> None:
    visitor = counted.visitor()
    visitor.run(lambda session: session.update(rows=secrets.token_bytes(20_000)))
    for name in counted.inside.blobs():
        counted.inside.spoil(name, None)
    assert visitor.run(lambda session: session.get("rows")) is None
    figures = read(counted.app)
    reasons = re.findall(r'``"([^"]+)"``', LargeValueLost.__doc__ or "")
    assert len(reasons) == 5
    for reason in reasons:
        name = f"gsession_large_values_lost_total{ {'reason': reason} }"
        assert figures[name] == (reason == "missing"), reason


def test_lost_races_are_counted(counted: Site) -> None:
    visitor = counted.visitor()
    visitor.run(lambda session: session.update(a=1))
    tab = visitor.another_tab()
    counted.before_each("save", lambda: tab.run(lambda session: session.update(b=1)))
    visitor.run(lambda session: session.update(c=1))
    figures = read(counted.app)
    assert figure(figures, "operations_total", operation="save", status="stale") == 1
    assert figure(figures, "retries_total") == 1
    assert figure(figures, "merges_total") == 1


def test_conflicts_are_counted(make_site: SiteMaker) -> None:
    site = make_site(conflict="reject")
    SessionMetrics(site.app, ext=site.ext)
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    tab = visitor.another_tab()
    site.before_each("save", lambda: tab.run(lambda session: session.update(a=2)))
    assert visitor.ask(lambda session: session.update(a=3)).status_code == 409
    figures = read(site.app)
    assert figure(figures, "conflicts_total", reason="refused") == 1
    assert figures["gsession_conflicts_total{'reason': 'transaction'}"] == 0


def test_an_ended_session_drops_writes(counted: Site) -> None:
    visitor = counted.visitor()
    visitor.run(lambda session: session.update(a=1))
    tab = visitor.another_tab()
    counted.before_each("save", lambda: tab.run(lambda session: session.destroy()))
    visitor.run(lambda session: session.update(c=1))
    figures = read(counted.app)
    assert figure(figures, "writes_dropped_total", reason="ended") == 1
    assert figure(figures, "operations_total", operation="save", status="gone") == 1


def test_locks_are_counted(counted: Site) -> None:
    visitor = counted.visitor()
    visitor.run(lambda session: session.update(a=1))

    def lock(session: Any) -> None:
        with session.lock():
            assert visitor.another_tab().ask(lock_impatiently).status_code == 503

    def lock_impatiently(session: Any) -> None:
        with session.lock(wait=0.05):
            pass

    visitor.run(lock)
    figures = read(counted.app)
    for event in ("acquired", "released", "wait over"):
        assert figure(figures, "locks_total", event=event) == 1, event
    assert figure(figures, "lock_wait_seconds_count") == 1
    assert figure(figures, "operations_total", operation="release", status="ok") >= 1


@pytest.fixture
def faulty() -> Iterator[tuple[Flask, HookedStore]]:
    """An application with metrics, whose store fails on demand, and whose breaker is off."""
    store = HookedStore(MemoryStore())
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    Session(app, store=store, breaker_failures=0)
    SessionMetrics(app)

    @app.get("/")
    def visit() -> str:
        session["visits"] = session.get("visits", 0) + 1
        return ""

    yield app, store
    store.close()


def test_an_outage_and_its_end(faulty: tuple[Flask, HookedStore]) -> None:
    app, store = faulty
    client = app.test_client()
    client.get("/")

    recover = keep_failing(store, "save", "renew")  # the latter is asked in the background
    assert client.get("/").status_code == 503
    figures = read(app)
    assert figure(figures, "store_up", session="session") == 0
    assert figure(figures, "operations_total", operation="save", status="unavailable") == 1
    assert figure(figures, "operation_duration_seconds_count", operation="save") == 1
    assert figure(figures, "writes_dropped_total", reason="store unavailable") == 1
    recover()
    assert client.get("/").status_code == 200
    assert figure(read(app), "store_up", session="session") == 1


def test_a_healthy_store_hides_no_dead_one() -> None:
    registry = CollectorRegistry()
    stores: list[HookedStore] = []

    def counted_app(cookie: str) -> Flask:
        app = Flask(__name__)
        app.secret_key = "a key for tests"
        stores.append(HookedStore(MemoryStore()))
        Session(app, store=stores[-1], cookie_name=cookie)
        SessionMetrics(app, registry=registry, count_every=None)
        app.add_url_rule("/", view_func=lambda: session.update(a=1) or "")
        return app

    def up(cookie: str) -> float | None:
        return registry.get_sample_value("gsession_store_up", {"session": cookie})

    apps = [counted_app(cookie) for cookie in ("one", "one", "two")]
    assert (up("one"), up("two")) == (1, 1)
    recover = keep_failing(stores[0], "create", "renew")
    for app in apps:
        app.test_client().get("/")
    assert (up("one"), up("two")) == (0, 1)
    recover()
    apps[0].test_client().get("/")
    assert (up("one"), up("two")) == (1, 1)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is down is asked again within a moment."""
    monkeypatch.setattr("flask_gsession.contrib.metrics_watch._INTERVAL", 0.02)


def fail() -> None:
    raise StoreUnavailable("pulled the plug")


def keep_failing(
    store: HookedStore, *operations: str, how: Callable[[], object] = fail
) -> Callable[[], None]:
    """Make each call of these operations fail, until the returned function is called."""
    over = threading.Event()

    def arm(operation: str) -> None:
        def hook() -> None:
            if not over.is_set():
                arm(operation)
                how()

        store.before(operation, hook)

    for operation in operations:
        arm(operation)
    return over.set


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("broken", ["load", "renew"])
def test_a_recovery_shows_without_a_request(counted: Site, broken: str) -> None:
    visitor = counted.visitor()
    visitor.run(lambda session: session.update(a=1))
    asked = threading.Semaphore(0)

    def refuse() -> None:
        asked.release()
        fail()

    recover = keep_failing(counted.store, broken, how=refuse)
    if broken == "renew":
        counted.store.before("load", fail)
    assert visitor.ask(dict).status_code == 503
    for _ in range(3):
        assert asked.acquire(timeout=60)
    before = read(counted.app)
    assert figure(before, "store_up", session="session") == 0
    recover()
    until(lambda: figure(read(counted.app), "store_up", session="session") == 1, "the recovery")
    calls = "gsession_operations_total"
    assert {name: before[name] for name in before if name.startswith(calls)} == {
        name: figure_ for name, figure_ in read(counted.app).items() if name.startswith(calls)
    }


def test_a_recovery_shows_on_the_page_where_no_thread_runs(
    counted: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_gsession.contrib.metrics_watch.runs_threads", lambda: False)
    monkeypatch.setattr("flask_gsession.contrib.metrics_watch._INTERVAL", 0)
    visitor = counted.visitor()
    visitor.run(lambda session: session.update(a=1))
    recover = keep_failing(counted.store, "load")
    assert visitor.ask(dict).status_code == 503
    assert figure(read(counted.app), "store_up", session="session") == 0
    recover()
    assert figure(read(counted.app), "store_up", session="session") == 1


@pytest.mark.usefixtures("impatient")
def test_circuits_close_without_a_request(make_site: SiteMaker) -> None:
    site = make_site(breaker_failures=1, breaker_pause=0.02)
    SessionMetrics(site.app, ext=site.ext)
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))

    def fail_slowly() -> None:
        threading.Event().wait(0.06)
        fail()

    recover = keep_failing(site.store, "load", "create", "renew", how=fail_slowly)
    assert visitor.ask(dict).status_code == 503
    assert site.visitor().ask(lambda session: session.update(a=1)).status_code == 503
    for operations in ("loads", "writes"):
        assert figure(read(site.app), "circuits_open", operations=operations) == 1
    recover()
    for operations in ("loads", "writes"):
        until(
            lambda of=operations: figure(read(site.app), "circuits_open", operations=of) == 0,
            operations,
        )


def test_contention_is_not_an_outage(faulty: tuple[Flask, HookedStore]) -> None:
    app, store = faulty

    def fail() -> None:
        raise StoreUnavailable("busy", contention=True)

    store.before("create", fail)
    assert app.test_client().get("/").status_code == 503
    figures = read(app)
    assert figure(figures, "store_up", session="session") == 1
    assert figure(figures, "operations_total", operation="create", status="unavailable") == 1


def test_words_of_a_foreign_store_make_no_series(faulty: tuple[Flask, HookedStore]) -> None:
    app, store = faulty
    client = app.test_client()
    client.get("/")
    for word in ("rotten", "moth-eaten"):

        def fail(word: str = word) -> None:
            store._hooks.clear()
            raise UnreadableRecord(word)

        store.before("load", fail)
        client.get("/")
        client.get("/")
    figures = read(app)
    assert figure(figures, "refused_total", reason="other") == 2
    assert figure(figures, "operations_total", operation="load", status="unreadable") == 2


def test_circuits(faulty: tuple[Flask, HookedStore]) -> None:
    app, _ = faulty
    (ext,) = app.extensions["gsession"]
    assert figure(read(app), "circuits_open", operations="writes") == 0
    ext._events.emit(CircuitOpened, "writes", "refused")
    figures = read(app)
    assert figure(figures, "circuits_open", operations="writes") == 1
    assert figure(figures, "circuits_open", operations="loads") == 0
    ext._events.emit(CircuitClosed, "writes", 1.5)
    assert figure(read(app), "circuits_open", operations="writes") == 0


def test_many_sessions_are_as_many_series_as_few(counted: Site) -> None:
    def visit(cookie: str | None = None) -> None:
        visitor = counted.visitor(cookie)
        visitor.run(lambda session: session.update(a=1))
        visitor.get(f"/{secrets.token_hex(4)}")

    visit()
    visit("x.y")
    visit("x" * 43 + "." + "y" * 22)
    until(lambda: live(counted.app) >= 0, "the first count of live sessions")
    before = read(counted.app)
    for _ in range(40):
        visit(secrets.token_hex(8))
        visit(secrets.token_urlsafe(32) + "." + secrets.token_urlsafe(16))
    assert set(read(counted.app)) == set(before)


def test_a_hundred_thousand_sessions_are_as_many_series_as_one() -> None:
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    Session(app, store=MemoryStore())
    SessionMetrics(app)
    (interface,) = app.extensions["gsession"].values()
    repository = interface.repository

    def work(number: int) -> None:
        for _ in range(number):
            name = secrets.token_hex(16)
            repository.store.load(name)
            repository.events.emit(SessionCreated, name)

    work(1)
    until(lambda: live(app) >= 0, "the first count of live sessions")
    before = read(app)
    work(100_000)
    after = read(app)
    assert set(after) == set(before)
    assert figure(after, "operations_total", operation="load", status="absent") == 100_001


def test_no_secret_in_the_page(counted: Site) -> None:
    visitor = counted.visitor()
    visitor.run(lambda session: session.update(canary="canary-value"))
    page = counted.app.test_client().get("/metrics").text
    for secret in (visitor.token, "canary", visitor.run(lambda session: session.handle)):
        assert secret not in page


# -- how many sessions there are


def live(app: Flask, cookie: str = "session") -> float:
    """The value of the gauge; -1 before the first count."""
    return read(app).get(f"gsession_sessions_live{{'session': '{cookie}'}}", -1)


def test_live_sessions_are_counted_in_the_background(store_url: str, store_prefix: str) -> None:
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    ext = Session(app, store=store_url, key_prefix=store_prefix)
    SessionMetrics(app, count_every=0.05)
    app.add_url_rule("/", view_func=lambda: session.update(a=1) or "")
    assert live(app) == -1
    clients = [app.test_client() for _ in range(3)]
    for client in clients:
        client.get("/")
    until(lambda: live(app) == 3, "three sessions")
    clients[0].get("/")
    app.test_client().get("/")
    until(lambda: live(app) == 4, "four sessions")
    ext.close(app)


def test_a_scrape_asks_no_store(counted: Site) -> None:
    counted.visitor().run(lambda session: session.update(a=1))
    with counted.counted() as count:
        read(counted.app)
    assert count.calls == []


def test_a_store_that_cannot_be_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Uncountable(MemoryStore):
        fails = True
        tries = 0

        def count(self) -> int:
            self.tries += 1
            if self.fails:
                raise StoreUnavailable("not now")
            return super().count()

    store = Uncountable()
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    Session(app, store=store)
    SessionMetrics(app, count_every=0.05)
    app.add_url_rule("/", view_func=lambda: session.update(a=1) or "")
    app.test_client().get("/")
    until(lambda: store.tries > 2 and math.isnan(live(app)), "no figure")
    store.fails = False
    until(lambda: live(app) == 1, "a figure again")
    assert caplog.text.count("Could not count the live sessions: ") == 1
    assert figure(read(app), "store_up", session="session") == 1


def test_the_counting_ends_with_the_application() -> None:
    def counting() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "gsession-watch"]

    app = application()
    SessionMetrics(app)
    others = counting()
    app.test_client().get("/")
    (mine,) = set(counting()) - set(others)
    del app
    gc.collect()
    mine.join(30)
    assert not mine.is_alive()


@pytest.mark.parametrize("every", [0, -1, 1e9, math.nan])
def test_an_interval_that_cannot_be(every: float) -> None:
    with pytest.raises(SettingError, match="count_every"):
        SessionMetrics(count_every=every)


def test_live_sessions_are_not_counted_with_count_every_none() -> None:
    app = application()
    SessionMetrics(app, count_every=None)
    app.test_client().get("/")
    assert live(app) == -1


# -- whose metrics


def test_subscribers_still_get_events(counted: Site) -> None:
    heard: list[SessionCreated] = []
    counted.ext.on(SessionCreated, heard.append)
    counted.visitor().run(lambda session: session.update(a=1))
    assert len(heard) == len(counted.happened(SessionCreated)) == 1


def application(**settings: Any) -> Flask:
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    Session(app, store="memory://", **settings)

    @app.get("/")
    def visit() -> str:
        session["visits"] = 1
        return ""

    return app


def test_the_metrics_of_the_application(make_site: SiteMaker) -> None:
    app = application()
    metrics = PrometheusMetrics(app, path="/own", registry=CollectorRegistry())
    SessionMetrics(app, metrics)
    app.test_client().get("/")
    page = app.test_client().get("/own").text
    assert "flask_http_request_total" in page
    assert figure(parsed(page), "sessions_total", event="created") == 1
    assert app.test_client().get("/metrics").status_code == 404


def test_an_exporter_that_is_not_given_is_refused() -> None:
    for options in ({}, {"path": "/own"}, {"path": None}):
        app = application()
        PrometheusMetrics(app, registry=CollectorRegistry(), **options)
        with pytest.raises(SettingError, match=r"SessionMetrics\(app, metrics\)"):
            SessionMetrics(app)
    app = application()
    PrometheusMetrics.for_app_factory(registry=CollectorRegistry()).init_app(app)
    with pytest.raises(SettingError, match=r"SessionMetrics\(app, metrics\)"):
        SessionMetrics(app)
    SessionMetrics(app, registry=CollectorRegistry())  # makes no page


def test_an_exporter_that_comes_later_is_an_error_on_the_page(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for path in ("/metrics", "/own"):
        app = application()
        SessionMetrics(app)
        PrometheusMetrics(app, path=path, registry=CollectorRegistry())
        caplog.clear()
        assert app.test_client().get("/metrics").status_code == 500
        assert "create it first, and call SessionMetrics(app, metrics)" in caplog.text


def test_a_page_of_the_applications_own(caplog: pytest.LogCaptureFixture) -> None:
    app = application()
    app.add_url_rule("/metrics", "mine", lambda: "mine")
    with pytest.raises(SettingError, match=r"view at '/metrics' already \('mine'\).*path="):
        SessionMetrics(app)
    SessionMetrics(app, path="/session-metrics")
    assert app.test_client().get("/metrics").text == "mine"
    assert "gsession_store_up" in app.test_client().get("/session-metrics").text
    app = application()
    SessionMetrics(app)
    app.add_url_rule("/metrics", "mine", lambda: "mine")
    assert app.test_client().get("/metrics").status_code == 500
    assert "'mine' at '/metrics' is never reached" in caplog.text


def test_several_sessions_share_a_page() -> None:
    app = application()
    further = Session(app, store="memory://", cookie_name="further", key_prefix="further:")
    SessionMetrics(app)
    SessionMetrics(app, ext=further)
    figures = read(app)
    assert figure(figures, "store_up", session="session") == 1
    assert figure(figures, "store_up", session="further") == 1


def test_some_metrics_by_name() -> None:
    app = application()
    SessionMetrics(app)
    page = app.test_client().get("/metrics?name[]=gsession_store_up")
    assert page.content_type.startswith("text/plain")
    assert parsed(page.text).keys() == {"gsession_store_up{'session': 'session'}"}


def test_applications_with_registries_of_their_own() -> None:
    first, second = application(), application()
    for app in (first, second):
        SessionMetrics(app)
    first.test_client().get("/")
    assert figure(read(first), "sessions_total", event="created") == 1
    assert figure(read(second), "sessions_total", event="created") == 0


def test_one_session_object_on_two_applications() -> None:
    ext = Session(store="memory://")
    metrics = SessionMetrics()
    apps = []
    for _ in range(2):
        app = Flask(__name__)
        app.secret_key = "a key for tests"
        ext.init_app(app)
        metrics.init_app(app)
        app.add_url_rule("/", view_func=lambda: session.update(a=1) or "")
        apps.append(app)
    apps[0].test_client().get("/")
    with apps[1].app_context():
        ext._events.emit(CircuitOpened, "loads", "refused")
    figures = [read(app) for app in apps]
    assert [figure(f, "sessions_total", event="created") for f in figures] == [1, 0]
    assert [figure(f, "circuits_open", operations="loads") for f in figures] == [0, 1]


def test_applications_that_share_a_registry_add_up() -> None:
    registry = CollectorRegistry()
    apps = [application(), application()]
    for app in apps:
        SessionMetrics(app, registry=registry)
        app.test_client().get("/")
    assert registry.get_sample_value("gsession_sessions_total", {"event": "created"}) == 2


def test_settings_that_cannot_be() -> None:
    with pytest.raises(SettingError, match="needs a Session"):
        SessionMetrics(Flask(__name__))
    app = application()
    SessionMetrics(app)
    with pytest.raises(SettingError, match="already"):
        SessionMetrics(app, registry=CollectorRegistry())
    with pytest.raises(SettingError, match="needs a Session"):
        SessionMetrics(application(), ext=Session())
    for options in (
        {"registry": "default"},
        {"registry": CollectorRegistry(), "metrics": PrometheusMetrics},
        {"metrics": CollectorRegistry()},
        {"path": "metrics"},
        {"path": None},
    ):
        with pytest.raises(SettingError, match=f"{next(iter(options))} (is|must be) "):
            SessionMetrics(**options)


def test_the_reloader_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WERKZEUG_RUN_MAIN", "true")
    app = application()
    SessionMetrics(app)
    assert app.test_client().get("/metrics").status_code == 404
    assert "DEBUG_METRICS=1" in caplog.text


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("metrics", "prometheus_flask_exporter", "metrics"), ("ratelimit", "flask_limiter", "limits")],
)
def test_a_missing_package_is_named(module: str, package: str, extra: str) -> None:
    code = f"import sys; sys.modules['{package}'] = None\nimport flask_gsession.contrib.{module}\n"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    last = run.stderr.strip().splitlines()[-1]
    assert last.endswith(f"install the extra, flask-gsession[{extra}]")
    assert package in last


# The pages of the application's own exporter and of its own server, and the hook.
EXPORTER = """
from prometheus_flask_exporter.multiprocess import GunicornPrometheusMetrics

def when_ready(server):
    GunicornPrometheusMetrics.start_http_server_when_ready({port}, "127.0.0.1")

def child_exit(server, worker):
    GunicornPrometheusMetrics.mark_process_dead_on_child_exit(worker.pid)
"""


def test_all_workers_in_one_page(tmp_path: Path, redis_url: str, store_prefix: str) -> None:
    figures = tmp_path / "figures"
    figures.mkdir()
    environment = {
        "WORKERS_STORE": redis_url,
        "WORKERS_PREFIX": store_prefix,
        "PROMETHEUS_MULTIPROC_DIR": str(figures),
    }
    app, port = "tests.harness.metrics_app:create_app()", free_port()
    exporter = EXPORTER.format(port=port)
    with Gunicorn(
        tmp_path, workers=2, environment=environment, app=app, configuration=exporter
    ) as server:
        url = f"http://127.0.0.1:{server.port}"
        pages = [f"{url}/metrics", f"http://127.0.0.1:{port}/"]
        workers = set()
        made = 0
        while len(workers) < 2 or made < 20:
            answer = requests.post(f"{url}/login/ada", timeout=60)
            workers.add(answer.headers["X-Worker"])
            made += 1

        def read_page(page: str = pages[0]) -> Figures:
            return parsed(requests.get(page, timeout=60).text)

        def all_there(where: str) -> bool:
            page = read_page(where)
            return (
                figure(page, "sessions_total", event="created") == made
                and figure(page, "operations_total", operation="create", status="ok") == made
                and figure(page, "request_seconds_count", endpoint="login") == made
            )

        for where in pages:
            until(lambda where=where: all_there(where), "the figures of all requests")
            theirs = f'flask_http_request_total{{method="POST",status="200"}} {made}.0'
            assert theirs in requests.get(where, timeout=60).text.splitlines()

        def counted() -> bool:
            return read_page().get("gsession_sessions_live{'session': 'session'}") == made

        until(counted, "a count of all sessions")
        page = read_page()
        assert figure(page, "store_up", session="session") == 1
        assert page["gsession_circuits_open{'operations': 'loads'}"] == 0
        for _ in range(5):  # and no time to look at the figures
            requests.post(f"{url}/login/ada", timeout=60)
        server.stop()
    assert in_files(figures, "sessions_total", event="created") == made + 5


def test_a_recovery_shows_in_all_workers(
    tmp_path: Path, own_redis: RedisServer, store_prefix: str
) -> None:
    figures = tmp_path / "figures"
    figures.mkdir()
    environment = {
        "WORKERS_STORE": own_redis.url,
        "WORKERS_PREFIX": store_prefix,
        "PROMETHEUS_MULTIPROC_DIR": str(figures),
    }
    app = "tests.harness.metrics_app:create_app()"
    with Gunicorn(tmp_path, workers=2, environment=environment, app=app) as server:
        url = f"http://127.0.0.1:{server.port}"

        def up() -> float:
            page = parsed(requests.get(f"{url}/metrics", timeout=60).text)
            return figure(page, "store_up", session="session")

        def is_seen_by_both(status: int) -> bool:
            answer = requests.post(f"{url}/login/ada", timeout=60)
            if answer.status_code == status:
                seen.add(answer.headers["X-Worker"])
            return len(seen) == 2

        seen: set[str] = set()
        until(lambda: is_seen_by_both(200), "two workers")
        own_redis.kill()
        try:
            seen.clear()
            until(lambda: is_seen_by_both(503), "an outage in both")
            assert up() == 0
        finally:
            own_redis.start()
        until(lambda: up() == 1, "the recovery, with no request but those for the page")


def in_files(folder: Path, name: str, **labels: str) -> float:
    """The metrics in the workers' files."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    return figure(parsed(generate_latest(registry).decode()), name, **labels)


# Four threads call the store and one forks, all at once. Then nobody calls it any more, but all
# counts must still reach the files. The children write theirs when they end.
BUSY = """
import os, sys, threading, time
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from flask import Flask
from flask_gsession import Session
from flask_gsession.contrib.metrics import SessionMetrics

app = Flask(__name__)
app.secret_key = "a key for tests"
ext = Session(app, store="memory://")
SessionMetrics(app, count_every=None)
store = app.extensions["gsession"][ext].repository.store
registry = CollectorRegistry()
MultiProcessCollector(registry)

def call(times):
    for _ in range(times):
        store.load("x" * 43)

def figure():
    labels = {"operation": "load", "status": "absent"}
    return registry.get_sample_value("gsession_operations_total", labels)

call(1)
threads = [threading.Thread(target=call, args=(5000,)) for _ in range(4)]
for thread in threads:
    thread.start()
children = []
for _ in range(10):
    child = os.fork()
    if not child:
        call(100)
        sys.exit()
    children.append(child)
for thread in threads:
    thread.join()
for child in children:
    assert os.waitpid(child, 0)[1] == 0
end = time.monotonic() + 60
while figure() != 21_001 and time.monotonic() < end:
    time.sleep(0.01)
assert figure() == 21_001, figure()
call(7)
"""


def test_no_figure_is_lost_or_counted_twice_by_threads_and_forks(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", BUSY]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    load = {"operation": "load"}
    assert in_files(tmp_path, "operations_total", **load, status="absent") == 21_008
    assert in_files(tmp_path, "operation_duration_seconds_count", **load) == 21_008


# A worker meets an outage and is killed; the next one finds the store well.
WORKER = """
import os, sys
from flask import Flask, session
from flask_gsession import Session, StoreUnavailable
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.stores.memory import MemoryStore

class Failing(MemoryStore):
    def create(self, record):
        if sys.argv[1] == "fails":
            raise StoreUnavailable("pulled the plug")
        super().create(record)

app = Flask(__name__)
app.secret_key = "a key for tests"
Session(app, store=Failing())
SessionMetrics(app, count_every=None)
app.add_url_rule("/", view_func=lambda: session.update(a=1) or "")
app.test_client().get("/")
print(app.test_client().get("/metrics?name[]=gsession_store_up").text, flush=True)
os._exit(0)
"""


def test_a_worker_that_was_killed_in_an_outage_leaves_no_trace(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for store, up in (("fails", 0), ("answers", 1)):
        command = [sys.executable, "-c", WORKER, store]
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert figure(parsed(run.stdout), "store_up", session="session") == up


def test_batched_amounts_equal_single_observations() -> None:
    registry = CollectorRegistry()
    figures = [Histogram(name, name, buckets=(1, 2.5), registry=registry) for name in ("a", "b")]
    amounts = [0, 0.5, 1, 1.5, 2.5, 2.6, 1e9]
    observed(figures[0])(amounts)
    for amount in amounts:
        figures[1].observe(amount)
    one, other = ([sample[1:3] for sample in each.collect()[0].samples][:-1] for each in figures)
    assert one == other


def test_figures_that_cannot_be_put_away(caplog: pytest.LogCaptureFixture) -> None:
    """They fail no request, and lose no other figures."""
    gathering, found = Gathering(), []
    for put in (lambda _: 1 / 0, found.append):
        gathering.add(put, 1.0)
    gathering.flush()
    until(lambda: found == [[1.0]], "the others")
    gathering.add(lambda _: 1 / 0, 1.0)
    gathering.flush()
    assert caplog.text.count("Metrics for Prometheus are lost: ZeroDivisionError") == 1


# -- rules and dashboards


def expressions() -> dict[str, str]:
    """The queries of the alert rules and of the dashboard."""
    found = {}
    text = RULES.read_text(encoding="utf-8")
    for alert, rule in re.findall(r"- alert: (\w+)\n(.*?)(?=- alert|\Z)", text, re.DOTALL):
        found[alert] = rule.partition("labels:")[0]
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['legendFormat']}"] = target["expr"]
    return found


@pytest.mark.parametrize("name", expressions())
def test_a_query_asks_for_existing_metrics(name: str) -> None:
    registry = CollectorRegistry()
    SessionMetrics(application(journal=True), registry=registry)
    shown = {}
    for family in registry.collect():
        suffixes = {"counter": ["_total"], "gauge": [""]}.get(
            family.type, ["_bucket", "_count", "_sum"]
        )
        shown.update({family.name + suffix: family for suffix in suffixes})
    asked = re.findall(r"gsession_\w+", expressions()[name])
    assert asked
    assert set(asked) <= set(shown)


def test_every_metric_is_on_the_dashboard() -> None:
    registry = CollectorRegistry()
    SessionMetrics(application(journal=True), registry=registry)
    queries = " ".join(expressions().values())
    assert [family.name for family in registry.collect() if family.name not in queries] == []


def test_the_dashboard_can_be_narrowed_to_a_job_and_explains_itself() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert [each["name"] for each in dashboard["templating"]["list"]] == [
        *("datasource", "job", "instance"),
    ]
    for panel in dashboard["panels"]:
        assert len(panel["description"]) > 60, panel["title"]
        for target in panel["targets"]:
            selectors = re.findall(r"gsession_\w+(?:{(.*?)})?", target["expr"])
            assert all('job=~"$job", instance=~"$instance"' in each for each in selectors)


def test_every_alert_has_a_unit_test() -> None:
    tests = (Path(__file__).parents[1] / "harness/prometheus_rules_test.yml").read_text(
        encoding="utf-8"
    )
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text(encoding="utf-8"))
    assert alerts
    firing = re.findall(r"alertname: (\w+)\n\s+exp_alerts:", tests)
    assert sorted(set(firing)) == sorted(alerts)


def test_every_metric_is_in_the_reference() -> None:
    registry = CollectorRegistry()
    SessionMetrics(application(), registry=registry)
    page = (Path(__file__).parents[2] / "docs/how-to/metrics.md").read_text(encoding="utf-8")
    for family in registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        assert f"`{name}" in page, name


def test_reads_from_the_near_cache_are_counted(
    redis_url: str, store_prefix: str, clock: FakeClock
) -> None:
    with SiteMaker(redis_url, store_prefix, clock) as make:
        site = make(near_cache=5.0)
        SessionMetrics(site.app, ext=site.ext)
        visitor = site.visitor()
        visitor.run(lambda session: session.update(a=1))

        def hits() -> float:
            visitor.run(dict)
            return figure(read(site.app), "near_reads_total", result="hit")

        until(lambda: hits() > 0, "a hit")
        loads = figure(read(site.app), "operations_total", operation="load", status="ok")
        visitor.run(dict)
        figures = read(site.app)
        assert figure(figures, "operations_total", operation="load", status="ok") == loads
        assert figure(figures, "near_reads_total", result="miss") == loads
        assert 0 < figure(figures, "near_age_seconds", session="session") < 5
