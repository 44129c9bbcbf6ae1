"""State per process, servers without threads, and servers before their fork."""

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from prometheus_client import CollectorRegistry

from flask_gsession import processes
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.contrib.metrics_gathering import Gathering
from flask_gsession.errors import StoreUnavailable
from flask_gsession.operate.cleanup import CleanupWorker
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.sqlite import file as sqlite
from flask_gsession.testing import a_record
from tests.harness.forking import Child, make_site

Uwsgi = Callable[..., None]


@pytest.fixture
def uwsgi(monkeypatch: pytest.MonkeyPatch) -> Uwsgi:
    """Makes this process look like one of uWSGI."""

    def be(*, worker: int = 1, mule: int = 0, threads: int = 1, **opt: Any) -> None:
        module = SimpleNamespace(
            worker_id=lambda: worker, mule_id=lambda: mule, has_threads=threads, opt=opt
        )
        monkeypatch.setattr(processes, "_uwsgi", module)

    return be


def is_open(url: str) -> bool:
    """Whether a connection to this SQLite file is open."""
    file = Path(url.removeprefix("sqlite:///")).stat()
    return any(
        (file.st_dev, file.st_ino) in connection.files
        for connection in list(sqlite._opened.connections)
    )


def ours() -> set[threading.Thread]:
    """Our threads, also of earlier tests, which may end at any time."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("gsession")}


def test_a_connection_stays_open_in_requests_and_commands(
    sqlite_url: str, store_prefix: str
) -> None:
    site = make_site(sqlite_url, store_prefix)
    store = site.ext.store(site.app)
    record = a_record(time.time)
    store.create(record)
    assert not is_open(sqlite_url)
    cookie = site.log_in("alice")
    assert is_open(sqlite_url)
    assert store.load(record.key) == record
    assert is_open(sqlite_url)
    site.ext.close(site.app)
    assert not is_open(sqlite_url)
    with click.Context(click.Command("any")):
        store.load(record.key)
    assert is_open(sqlite_url)
    site.ext.close(site.app)
    assert site.client(cookie).get("/all").json == {"user": "alice"}
    site.ext.close(site.app)


def test_the_master_of_uwsgi_keeps_nothing_open(
    sqlite_url: str, store_prefix: str, uwsgi: Uwsgi
) -> None:
    """Also not after a request of a test client; the only worker does, in the same process."""
    uwsgi(worker=0)
    site = make_site(sqlite_url, store_prefix)
    CleanupWorker(site.app)
    SessionMetrics(site.app, registry=CollectorRegistry())
    before = ours()
    cookie = site.log_in("alice")
    assert not is_open(sqlite_url)
    assert not ours() - before
    uwsgi(worker=1)
    assert site.client(cookie).get("/all").json == {"user": "alice"}
    assert is_open(sqlite_url)
    assert ours() - before
    site.ext.close(site.app)


@pytest.mark.parametrize("kind", ["sqlite", "redis", "mongodb"])
def test_the_master_of_uwsgi_listens_to_nothing(
    kind: str, request: pytest.FixtureRequest, store_prefix: str, uwsgi: Uwsgi
) -> None:
    """A child of a fork in C hangs if a thread of its parent waited for the interpreter's lock."""
    uwsgi(worker=0)
    near = {"near_cache": 5.0} if kind == "redis" else {}
    site = make_site(request.getfixturevalue(f"{kind}_url"), store_prefix, **near)
    before = ours()
    client = site.client(site.log_in("alice"))
    with site.app.app_context():
        assert client.get("/all").json == client.get("/all").json == {"user": "alice"}
        with pytest.raises(StoreUnavailable, match="postfork"):
            site.ext.live.watch(user_id="alice")
        changes = site.ext.store().changes
        assert changes is not None
        changes.subscribe(SimpleNamespace(changed=bool, lost=bool))
        changes.start()
        assert not ours() - before
        uwsgi(worker=1)
        site.ext.live.watch(user_id="alice")
        assert {thread.name for thread in ours() - before} == {"gsession-live", "gsession-listener"}
    site.ext.close(site.app)


def test_a_mule_of_uwsgi_is_not_a_master(uwsgi: Uwsgi) -> None:
    uwsgi(worker=0, mule=1)
    assert not processes.is_before_fork()


def test_without_threads_the_start_names_the_features_that_need_them(
    mongodb_url: str, store_prefix: str, uwsgi: Uwsgi, caplog: pytest.LogCaptureFixture
) -> None:
    uwsgi(threads=0)
    with caplog.at_level(logging.WARNING, "flask_gsession"):
        site = make_site(mongodb_url, store_prefix)
        CleanupWorker(site.app)
        SessionMetrics(site.app, registry=CollectorRegistry())
    lines = [line for line in caplog.messages if "enable-threads = true" in line]
    assert len(lines) == 3
    for line, word in zip(lines, ("PyMongo", "CleanupWorker", "metrics"), strict=True):
        assert word in line
    before = ours()
    site.log_in("alice")
    assert not ours() - before
    site.ext.close(site.app)


@pytest.mark.parametrize("state", [{"threads": 0}, {"worker": 0}], ids=["no threads", "master"])
def test_figures_are_put_away_at_once(state: dict[str, int], uwsgi: Uwsgi) -> None:
    uwsgi(**state)
    found: list[Sequence[float]] = []
    gathering = Gathering()
    for amount in (1, 2):
        gathering.add(found.append, amount)
        assert found[-1] == [amount]


def test_greenlets_run_without_threads(uwsgi: Uwsgi) -> None:
    uwsgi(threads=0, gevent=b"100")
    assert processes.runs_threads()


def test_outside_uwsgi_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    processes.warn_without_threads("nothing")
    assert not caplog.messages
    assert not processes.is_before_fork()


class Kept:
    begun = 0

    def begin(self) -> None:
        self.begun += 1


def test_a_new_process_begins_once_and_keeps_nothing_alive() -> None:
    kept, gone = Kept(), Kept()
    process = processes.Process()
    process.register(kept.begin)
    process.register(gone.begin)
    process.notice()
    assert kept.begun == 0
    del gone
    gc.collect()

    def child() -> int:
        threads = [threading.Thread(target=process.notice) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return kept.begun

    assert Child(child).result() == 1
    assert kept.begun == 0


def test_a_fork_waits_for_calls_that_are_under_way(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that begin after it wait, too, and the child can use the file."""
    monkeypatch.setattr(sqlite, "_WAIT_TO_FORK", 60)  # on a slow machine
    store: Any = open_store(sqlite_url, StoreOptions())[0]
    record = a_record(time.time)
    store.create(record)
    within, leave = threading.Event(), threading.Event()

    def use() -> None:
        store.file.within(lambda db: (within.set(), leave.wait(60)))

    thread = threading.Thread(target=use)
    thread.start()
    assert within.wait(60)
    timer = threading.Timer(0.1, leave.set)
    timer.start()
    assert Child(lambda: store.load(record.key) == record).result() is True
    thread.join()
    timer.join()


def test_a_call_that_outlasts_the_wait_is_refused_in_the_child(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_WAIT_TO_FORK", 0.01)
    store: Any = open_store(sqlite_url, StoreOptions())[0]
    record = a_record(time.time)
    store.create(record)

    def child() -> str:
        try:
            store.load(record.key)
        except Exception as error:
            return str(error)
        return "loaded"

    said = store.file.within(lambda db: Child(child).result())
    assert "was open when this process was forked" in said
    assert "lazy-apps" in said
    assert store.load(record.key) == record


def test_registered_callbacks_may_outlive_the_registry() -> None:
    # As at the end of the interpreter, where an error in a callback would be printed.
    class Owner:
        def begin(self) -> None: ...

    owner, registry = Owner(), processes.Process()
    registry.register(owner.begin)
    callbacks = [reference.__callback__ for reference in weakref.getweakrefs(owner)]
    del registry
    gc.collect()
    assert callbacks
    for callback in callbacks:
        assert callback is not None
        callback(weakref.ref(owner))
