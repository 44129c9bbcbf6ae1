"""`CleanupWorker`: cleans up now and then, one process of many at a time, and ends with its own."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from prometheus_client import CollectorRegistry

from flask_gsession import Session, SettingError, StoreUnavailable
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.events import CleanedUp, CleanupFailed
from flask_gsession.operate.cleanup import NAME, CleanupWorker
from flask_gsession.stores import Store, StoreOptions
from flask_gsession.stores.base import CLEANUP_KEY
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.parts import Tidied
from flask_gsession.stores.sqlite import SQLiteStore
from flask_gsession.testing import FakeClock, a_record
from tests.harness.apps import Site
from tests.harness.console import ROOT, Console
from tests.harness.gunicorn import Gunicorn
from tests.harness.topologies import until
from tests.test_docs import FOLDER_STORE

HOUR = 3600.0


class Process:
    """One of many processes on a store. `runs`: the findings of each run of its worker."""

    def __init__(self, store: Store, clock: Callable[[], float], **options: Any) -> None:
        self.console = Console(store, clock=clock)
        self.app = self.console.app
        self.worker = CleanupWorker(self.app, **options)
        self.runs: list[dict[str, int]] = []
        self.failures: list[str] = []
        self.console.ext.on(CleanedUp, lambda event: self.runs.append(event.found))
        self.console.ext.on(CleanupFailed, lambda event: self.failures.append(event.detail))

    def run(self) -> float:
        return self.worker.run(self.app)

    @property
    def inside(self) -> Any:
        """The worker of the one session."""
        return next(iter(self.app.extensions[NAME].values()))


def a_thread() -> bool:
    """Whether the thread of a worker is there."""
    return any(thread.name == NAME for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_stays() -> Any:
    yield
    if a_thread():
        gc.collect()  # of applications that nobody stopped
        until(lambda: not a_thread(), "the end of the threads")


# -- one of many


def test_one_process_of_many_and_once_an_interval(site: Site) -> None:
    site.visitor().run(lambda session: session.update(a=1))
    one, two = (Process(site.store.store, site.clock) for _ in range(2))
    assert HOUR <= one.run() <= HOUR * 1.2
    assert HOUR - 1 <= two.run() <= HOUR * 1.2
    assert (len(one.runs), len(two.runs)) == (1, 0)
    site.clock.advance(HOUR - 1)
    two.run()
    assert two.runs == []
    site.clock.advance(1)
    two.run()
    one.run()
    assert (len(one.runs), len(two.runs)) == (1, 1)
    assert one.failures + two.failures == []


def test_the_worker_removes_expired_sessions(site: Site) -> None:
    for _ in range(5):
        site.visitor().run(lambda session: session.update(a=1))
    site.clock.advance(100 * 86400)
    live = site.visitor()
    live.run(lambda session: session.update(a=1))
    process = Process(site.store.store, site.clock, batch=2)
    process.run()
    assert live.run(dict) == {"a": 1}
    if not site.url.startswith("redis"):  # which removes records by its own clock
        assert process.runs[0]["expired sessions"] >= 1
        assert len(site.stored()) == 2  # with the ticket
    # The ticket is no session.
    assert process.console.done("list").count("\n") == 1
    assert "1 session ended" in process.console.done("revoke", "--all", "--yes")
    process.run()
    assert len(process.runs) == 1


def test_the_worker_logs_its_results(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "flask_gsession")
    store = MemoryStore(StoreOptions(clock=clock))
    process = Process(store, clock)
    process.run()
    for _ in range(3):
        store.create(a_record(clock, payload=b"canary"))
    clock.advance(100 * 86400)
    process.run()
    (number,) = (each for each in process.runs[1].values() if each)
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    nothing, something = said
    assert nothing[0] == "DEBUG"
    assert re.fullmatch(r"Clean-up done in \d+\.\d s: nothing to do", nothing[1])
    assert something[0] == "INFO"
    assert re.fullmatch(rf"Clean-up done in \d+\.\d s: expired sessions: {number}", something[1])


def test_the_ticket_is_not_a_session(site: Site, tmp_path: Path) -> None:
    process = Process(site.store.store, site.clock)
    process.run()
    store, console = site.store.store, process.console
    assert store.load(CLEANUP_KEY) is not None
    assert store.counts.count() == 0
    assert console.done("list") == ""
    assert json.loads(console.done("stats", "--json"))["sessions"] == 0
    assert "0 records exported" in console.done("export", str(tmp_path / "sessions.jsonl"))
    assert "0 sessions ended" in console.done("revoke", "--all", "--yes")
    assert "is not a handle" in console.failed("show", CLEANUP_KEY, status=2)
    assert "is not a handle" in console.failed("revoke", CLEANUP_KEY, status=2)
    assert store.load(CLEANUP_KEY) is not None


def test_one_of_several_processes_cleans_up(site: Site) -> None:
    processes = [Process(site.store.store, site.clock) for _ in range(6)]
    start = threading.Barrier(len(processes))

    def run(process: Process) -> None:
        start.wait()
        process.run()

    threads = [threading.Thread(target=run, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(process.runs) for process in processes) == 1
    assert [process.failures for process in processes] == [[]] * 6


def test_a_dead_worker_is_replaced(site: Site) -> None:
    one, two = (Process(site.store.store, site.clock) for _ in range(2))
    assert one.inside._take_ticket() is not None
    assert 50 <= two.run() <= 72
    assert two.runs == []
    site.clock.advance(60)
    two.run()
    assert len(two.runs) == 1


class InSteps(MemoryStore):
    """A clean-up of ten steps, in each of which something happens."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(StoreOptions(clock=clock))
        self.happens: Callable[[int], object] = lambda step: None
        self.steps = 0

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        step = int(cursor or 0)
        self.steps += 1
        self.happens(step)
        return Tidied({"orphaned locks": 1}, 1, str(step + 1) if step < 9 else "")


def test_a_long_one_keeps_the_others_out(clock: FakeClock) -> None:
    store = InSteps(clock)
    one, two = Process(store, clock), Process(store, clock)

    def happens(step: int) -> None:
        clock.advance(30)
        store.happens = lambda step: None
        two.run()
        store.happens = happens

    store.happens = happens
    one.run()
    assert one.runs == [{"orphaned locks": 10}]
    assert two.runs == []


def test_a_paused_worker_leaves_the_work_to_the_other(clock: FakeClock) -> None:
    store = InSteps(clock)
    one, two = Process(store, clock), Process(store, clock)

    def happens(step: int) -> None:
        store.happens = lambda step: None
        clock.advance(61)
        two.run()

    store.happens = happens
    one.run()
    assert (one.runs, one.failures) == ([], [])
    assert len(two.runs) == 1
    assert store.steps == 11
    one.run()
    assert one.runs == []  # the ticket of the other stands


# -- failures


def test_the_worker_backs_off_after_failures(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    store = InSteps(clock)
    one, two = Process(store, clock), Process(store, clock)

    def fail(step: int) -> None:
        raise StoreUnavailable("pulled the plug")

    store.happens = fail
    for wait in (10, 20, 40, 80):
        assert wait <= one.run() <= wait * 1.2
    for _ in range(20):
        last = one.run()
    assert HOUR <= last <= HOUR * 1.2
    assert one.failures == ["pulled the plug"] * 24
    assert "pulled the plug" in caplog.text
    assert 10 <= two.run() <= 12  # nobody holds it up
    store.happens = lambda step: None
    one.run()
    assert len(one.runs) == 1
    clock.advance(HOUR)
    store.happens = fail
    assert 10 <= one.run() <= 12


def test_an_error_of_the_store_itself_does_not_end_it(clock: FakeClock) -> None:
    store = InSteps(clock)
    process = Process(store, clock)
    store.happens = lambda step: 1 / 0
    assert 10 <= process.run() <= 12
    assert "ZeroDivisionError" in process.failures[0]


def test_a_store_that_is_down(clock: FakeClock) -> None:
    process = Process(SQLiteStore("/dev/null/sessions.sqlite3"), clock)
    assert 10 <= process.run() <= 12
    assert len(process.failures) == 1


def test_clean_ups_are_counted(clock: FakeClock) -> None:
    store = InSteps(clock)
    process = Process(store, clock)
    registry = CollectorRegistry()
    SessionMetrics(process.app, registry=registry, count_every=None)

    def figure(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"gsession_{name}", labels)

    assert figure("cleanups_total", status="done") == 0
    store.happens = lambda step: 1 / 0
    process.run()
    store.happens = lambda step: None
    process.run()
    assert figure("cleanups_total", status="failed") == 1
    assert figure("cleanups_total", status="done") == 1
    assert figure("leftovers_total", kind="orphaned locks") == 10
    assert figure("leftovers_total", kind="expired sessions") == 0


@pytest.mark.parametrize(
    "options", [{"interval": 0}, {"interval": -1}, {"interval": 1e9}, {"batch": 0}]
)
def test_wrong_settings(options: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        CleanupWorker(**options)


def test_where_there_is_nothing_to_look_after() -> None:
    app = Flask(__name__)
    with pytest.raises(SettingError, match="needs a Session"):
        CleanupWorker(app)
    with pytest.raises(SettingError, match="not on the application"):
        CleanupWorker().run(app)
    Session(app, store="memory://")
    CleanupWorker(app)
    with pytest.raises(SettingError, match="already"):
        CleanupWorker(app)


def test_each_session_has_its_own() -> None:
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    stores = [FOLDER_STORE.FolderStore("none"), MemoryStore()]
    first = Session(app, store=stores[0])
    second = Session(app, store=stores[1], cookie_name="second")
    workers = [CleanupWorker(app, ext=first), CleanupWorker(app, ext=second)]
    workers[1].run(app)
    assert stores[1].load(CLEANUP_KEY) is not None


# -- the thread


def test_the_worker_starts_with_a_request_and_ends_with_stop(clock: FakeClock) -> None:
    process = Process(InSteps(clock), clock)
    assert not a_thread()
    client = process.app.test_client()
    for _ in range(3):
        client.get("/")
    until(lambda: process.runs, "the first clean-up")
    assert sum(thread.name == NAME for thread in threading.enumerate()) == 1
    process.worker.stop(process.app)
    until(lambda: not a_thread(), "its end")
    clock.advance(HOUR)
    process.worker.start(process.app)
    until(lambda: len(process.runs) == 2, "the second one")
    process.worker.stop(process.app)


def test_a_stop_lasts_until_a_start(clock: FakeClock) -> None:
    process = Process(InSteps(clock), clock)
    client = process.app.test_client()
    process.worker.stop(process.app)  # before the first request
    client.get("/")
    assert not a_thread()
    process.worker.start(process.app)
    until(lambda: process.runs, "a clean-up")
    process.worker.stop(process.app)
    until(lambda: not a_thread(), "its end")
    client.get("/")
    assert not a_thread()
    clock.advance(2 * HOUR)
    process.run()  # by a scheduler: to its end all the same
    assert len(process.runs) == 2


def test_a_stop_in_the_middle(clock: FakeClock) -> None:
    store = InSteps(clock)
    process, other = Process(store, clock), Process(store, clock)
    reached = threading.Event()

    def happens(step: int) -> None:
        reached.set()
        until(process.inside._stop.is_set, "the stop")

    store.happens = happens
    process.worker.start(process.app)
    assert reached.wait(30)
    process.worker.stop(process.app)
    until(lambda: not a_thread(), "its end")
    assert store.steps == 1
    assert process.runs == []
    other.run()  # at once
    assert len(other.runs) == 1


def test_the_worker_does_not_keep_the_application_alive(clock: FakeClock) -> None:
    process = Process(InSteps(clock), clock)
    runs = process.runs
    process.worker.start(process.app)
    until(lambda: runs, "a clean-up")
    del process  # the fixture sees the thread end


FORK = """
import os, sys, threading
from flask import Flask
from flask_gsession import Session
from flask_gsession.operate.cleanup import NAME, CleanupWorker
from flask_gsession.events import CleanedUp

app = Flask(__name__)
app.secret_key = "a key for tests"
ext = Session(app, store=sys.argv[1])
done = threading.Event()
ext.on(CleanedUp, lambda event: done.set())
CleanupWorker(app)

def threads():
    return [thread.name for thread in threading.enumerate()].count(NAME)

app.test_client().get("/")
assert done.wait(30)  # SQLite must not be forked in the middle of a call
child = os.fork()
if child == 0:
    before = threads()
    app.test_client().get("/")
    sys.exit(0 if (before, threads()) == (0, 1) else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(status or (0 if threads() == 1 else 4))
"""


def test_a_forked_process_has_its_own(sqlite_url: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FORK, sqlite_url], cwd=ROOT, capture_output=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@pytest.mark.long
def test_under_gunicorn(tmp_path: Path) -> None:
    """A worker that shuts down in the middle of a clean-up leaves the rest to others."""
    (tmp_path / "instance").mkdir()
    path = tmp_path / "instance" / "gsession.sqlite3"
    prefix = "test:"
    store = SQLiteStore(path, StoreOptions(prefix=prefix))
    past = FakeClock(time.time() - 86400)
    for _ in range(3000):  # of which each takes a step, and a breath
        record = a_record(past)
        store.file.within(partial(store._records.layout.insert, record=record))

    def rows(condition: str = "TRUE") -> int:
        with closing(sqlite3.connect(path, timeout=30)) as db:
            (count,) = db.execute(f"SELECT count(*) FROM gsession WHERE {condition}").fetchone()
        return int(count)

    environment = {"WORKERS_PREFIX": prefix}
    with Gunicorn(
        tmp_path, "--preload", workers=2, environment=environment,
        app="tests.harness.workers_app:create_cleaned_app()",
    ) as gunicorn:  # fmt: skip
        assert rows() == 3000  # nobody does it in the master
        cookie = gunicorn.log_in("ada")
        until(lambda: rows() < 2990, "the clean-up")
        assert gunicorn.get("/whoami", cookie).body["user"] == "ada"
        assert rows(f"key = '{prefix}{CLEANUP_KEY}'") == 1
        assert gunicorn.stop() == 0, gunicorn.log
        assert "Traceback" not in gunicorn.log
    assert rows(f"key = '{prefix}{CLEANUP_KEY}'") == 0
    assert rows() > 100
    process = Process(store, time.time)
    process.run()
    assert rows(f"idle_expires_at < {time.time() * 1000 - 3_600_000}") == 0
    assert len(process.runs) == 1
