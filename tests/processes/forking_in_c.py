"""Functions for test_forks_in_c.py, each in its own process: `python -m ... NAME URL FOLDER`.

A function here uses sessions, forks by the C function, so that Python runs no fork hooks, and
returns what was seen.
"""

import ctypes
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flask import Flask

from flask_gsession import Session, session
from flask_gsession.errors import LockMisused, StoreUnavailable
from flask_gsession.events import CleanedUp, Events
from flask_gsession.operate.cleanup import CleanupWorker
from flask_gsession.processes import process
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.wrappers.breaker import Circuit
from flask_gsession.testing import a_record
from flask_gsession.tokens import session_key
from tests.harness.forking import DEADLINE, Child, Site, make_site, post

fork_in_c = ctypes.PyDLL(None).fork
EACH = 15
QUIET = 0.02  # seconds in which no other thread runs, before a fork
STATUS = ("State:", "voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:")


def fork() -> int:
    """Fork in C, while all other threads sleep.

    A thread that waits for the interpreter's lock asks for it after the switch interval. The child
    inherits such a request, and would wait forever for a thread that it doesn't have. CPython only
    forgets the request after a fork of its own.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(DEADLINE)  # nobody asks
    try:
        runs = None
        while runs != (runs := runs_of_others()) or "R (running)" in str(runs):
            time.sleep(QUIET)
        return int(fork_in_c())
    finally:
        sys.setswitchinterval(interval)


def runs_of_others() -> dict[str, list[str]]:
    """The state of each other thread, and how often it was put to sleep.

    On a busy machine, a thread that could run has the state "R" for long, and doesn't get a turn.
    """
    found = {}
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != threading.get_native_id():
            with suppress(OSError):  # it has just ended
                lines = (task / "status").read_text().splitlines()
                found[task.name] = [line for line in lines if line.startswith(STATUS)]
    return found


class CChild(Child):
    """A process forked in C."""

    fork = staticmethod(fork)


def tasks() -> int:
    """How many threads this process really has; Python also counts its parent's."""
    return len(os.listdir("/proc/self/task"))


def statuses(site: Site, cookie: str) -> list[int]:
    return [site.client(cookie).post("/count").status_code for _ in range(EACH)]


def used_in_a_request(url: str, _: Path) -> Any:
    """Two children and their parent go on side by side; the status of each answer."""
    site = make_site(url, "forks:")
    cookie = site.log_in("alice")
    children = [CChild(lambda: statuses(site, cookie)) for _ in range(2)]
    parent = statuses(site, cookie)
    answers = [child.result() for child in children]
    return {
        "parent": sorted(set(parent)),
        "children": sorted({status for each in answers for status in each}),
        "lost": sum(each.count(200) for each in [parent, *answers])
        - post(site.client(cookie), "/count")["count"]
        + 1,
    }


def used_outside_requests(url: str, _: Path) -> Any:
    """As a warm-up before the fork; then children, and a child of a child."""
    site = make_site(url, "forks:")
    with site.app.app_context():
        record = a_record(time.time)
        site.ext.store().create(record)

    def child() -> Any:
        below = CChild(lambda: CChild(lambda: post(site.client(cookie), "/count")).result())
        return below.result()["count"]

    cookie = CChild(lambda: site.log_in("alice")).result()
    counts = [CChild(lambda: post(site.client(cookie), "/count")["count"]).result(), child()]
    with site.app.app_context():
        found = site.ext.store().load(record.key) == record
    return {"found": found, "counts": [*counts, post(site.client(cookie), "/count")["count"]]}


def a_bare_store(url: str, _: Path) -> Any:
    """No request notices the fork: whether the child's connection is new, the parent's the same."""
    store: Any = open_store(url, StoreOptions("forks:"))[0]

    def port() -> int:
        store.load("A" * 43)
        (used,) = (slot for slot in store.commands.pool._lent.idle if slot.connection is not None)
        return int(used.connection._sock.getsockname()[1])

    own = port()
    return [CChild(port).result() != own, port() == own]


def closed_before(url: str, _: Path) -> Any:
    """The store was used in requests, and closed before each fork."""
    site = make_site(url, "forks:")
    cookie = site.log_in("alice")
    counts = []
    for _ in range(3):
        site.ext.close(site.app)
        counts.append(CChild(lambda: post(site.client(cookie), "/count")["count"]).result())
        counts.append(post(site.client(cookie), "/count")["count"])
    return counts


def replaced_file(url: str, _: Path) -> Any:
    """The child refuses the file that was open, but not another one in its place."""
    site = make_site(url, "forks:")
    cookie = site.log_in("alice")
    path = url.removeprefix("sqlite:///")

    def child() -> Any:
        refused = site.client(cookie).get("/all").status_code
        for end in ("", "-wal", "-shm"):
            Path(path + end).unlink(missing_ok=True)
        return [refused, post(site.client(site.log_in("bob")), "/count")]

    return CChild(child).result()


def inside_a_request(url: str, _: Path) -> Any:
    """Parent and child end the same request."""
    site = make_site(url, "forks:")
    answers: list[Any] = []

    @site.app.post("/fork")
    def forks() -> Any:
        session.get("user")
        child = fork()
        try:
            session.update_atomic("n", lambda n: n + 1, 0)
        except StoreUnavailable:
            if child:
                raise
            os._exit(3)
        if child == 0:
            os._exit(0)
        answers.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return {}

    client = site.client(site.log_in("alice"))
    assert client.post("/fork").status_code == 200
    return [*answers, client.get("/all").json["n"]]


def locks(url: str, _: Path) -> Any:
    """A lock that is held across the fork, and one that the child takes and has extended."""
    site = make_site(url, "forks:", lock_timeout=4, lock_wait=DEADLINE, lock_warn=None)
    extended = threading.Event()
    closed = threading.Lock()  # an extension would open the store again before the fork
    leases: Any = site.ext.store(site.app).leases
    extend = leases.extend

    def tell(*arguments: Any) -> bool:
        with closed:
            extended.set()
            return bool(extend(*arguments))

    leases.extend = tell

    @site.app.post("/hold")
    def hold() -> Any:
        with session.lock():
            extended.clear()
            assert extended.wait(DEADLINE)
            session["held"] = True
        return {}

    @site.app.post("/fork")
    def forks() -> Any:
        with session.lock() as held:
            assert held is session._get_current_object()
            with closed:
                site.ext.close(site.app)
                child = CChild(in_child)
            time.sleep(0.05)  # the child gets in line, or not: both must work
            session["held"] = "by the parent"
            entered.append(child)
        return {}

    def in_child() -> Any:
        closed.release()
        misused = ""
        try:
            session["n"] = 1
            session.update_atomic("n", lambda n: n + 1)
        except LockMisused as error:
            misused = type(error).__name__
        answer = post(site.client(other), "/hold")
        held = post(site.client(mine), "/hold")
        return [misused, answer, held]

    entered: list[Any] = []
    mine, other = site.log_in("alice"), site.log_in("bob")
    post(site.client(mine), "/hold")
    post(site.client(mine), "/fork")
    result = entered[0].result()
    return [result, site.client(mine).get("/all").json]


def metrics(url: str, folder: Path) -> Any:
    """How many session creations are counted by the parent and its child."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    from flask_gsession.contrib.metrics import SessionMetrics
    from flask_gsession.contrib.metrics_figures import figures_of

    registry = CollectorRegistry()
    site = make_site(url, "forks:")
    SessionMetrics(site.app, registry=registry, count_every=None)
    gathering = figures_of(registry).gathering
    assert gathering is not None

    def child() -> int:
        for _ in range(EACH):
            site.log_in("bob")
        threads = tasks()
        gathering.flush()
        return threads

    for _ in range(EACH):
        site.log_in("alice")
    site.ext.close(site.app)
    with gathering._lock:  # the thread that writes could hold a lock of prometheus_client
        forked = CChild(child)
    threads = forked.result()
    gathering.flush()
    page = CollectorRegistry()
    MultiProcessCollector(page)  # type: ignore[no-untyped-call]
    created = page.get_sample_value("gsession_sessions_total", {"event": "created"})
    return [created, threads > 1]


def circuits(url: str, _: Path) -> Any:
    """An open circuit of the parent, whose lock another of its threads holds."""
    circuit = Circuit("loads", 1, DEADLINE, 1.0, Events())

    def slow() -> str:
        began = time.monotonic()
        while time.monotonic() - began < 0.06:
            pass
        raise StoreUnavailable("slow")

    with suppress(StoreUnavailable):
        circuit.call(slow)
    assert not circuit.is_healthy
    with circuit._lock:
        return CChild(lambda: [circuit.call(lambda: "loaded"), circuit.is_healthy]).result()


def cleanup(url: str, _: Path) -> Any:
    """The child begins a worker of its own."""
    site = make_site(url, "forks:")
    CleanupWorker(site.app)
    done = threading.Event()
    site.ext.on(CleanedUp, lambda _: done.set())
    site.log_in("alice")
    assert done.wait(DEADLINE)  # no fork beside a thread in the middle of a call
    site.ext.close(site.app)

    def child() -> bool:
        before = tasks()
        site.client().get("/all")
        return before < tasks()

    return CChild(child).result()


def live(url: str, _: Path) -> Any:
    """Parent and children watch the same session, whose changes each of them hears by itself."""
    site = make_site(url, "forks:")
    cookie = site.log_in("alice")
    watches = []

    def hears() -> bool:
        with site.app.app_context():
            handle = session_key(cookie.partition(".")[0])
            watches.append(site.ext.live.watch(handle))
            hints = site.ext.live.hints()
            hints.heartbeat = DEADLINE
            state = watches[-1].state
            until = time.monotonic() + DEADLINE
            while not hints._is_reported(watches[-1]) and time.monotonic() < until:
                time.sleep(0.01)  # the listener connects
            post(site.client(cookie), "/count")
            while watches[-1].state == state and time.monotonic() < until:
                time.sleep(0.01)
            return watches[-1].state != state

    def child() -> list[bool]:
        return [hears(), CChild(hears).result()]

    return [hears(), *CChild(child).result(), hears()]


def large_values(url: str, folder: Path) -> Any:
    """Large values in files, and the event loop of fsspec, whose thread the child has not."""
    import fsspec.asyn

    site = make_site(url, "forks:", spill_store=f"file://{folder}/large", spill_bytes=1024)

    @site.app.post("/large")
    def large() -> Any:
        session["large"] = session.get("large", "") + "x" * 5000
        return {"size": len(session["large"])}

    async def answer() -> int:
        return 42

    def run() -> Any:
        return fsspec.asyn.sync(fsspec.asyn.get_loop(), answer, timeout=DEADLINE / 2)

    client = site.client()
    sizes = [post(client, "/large")["size"], run()]
    site.ext.close(site.app)
    return [*sizes, *CChild(lambda: [post(client, "/large")["size"], run()]).result()]


def rate_limits(url: str, _: Path) -> Any:
    """All processes count in one bucket."""
    from flask_gsession.contrib.ratelimit import SessionLimits, session_limit

    site = make_site(url, "forks:")
    SessionLimits(site.app, proxies=0)

    @site.app.get("/limited")
    @session_limit("6/hour")
    def limited() -> str:
        return ""

    def ask() -> list[int]:
        return [site.client().get("/limited").status_code for _ in range(2)]

    return [*ask(), *CChild(ask).result(), *CChild(ask).result(), *ask()]


def pauses(url: str, _: Path) -> Any:
    """Two children must not draw the same pauses after a lost race."""

    def draw() -> float:
        process.notice()
        return random.random()

    return len({CChild(draw).result() for _ in range(3)})


def a_client(url: str, _: Path) -> Any:
    """A client of the application's own."""
    if url.startswith("redis"):
        from redis import Redis

        client: Any = Redis.from_url(url)
    else:
        from pymongo import MongoClient

        client = MongoClient(url)
    app = Flask("shop")
    app.secret_key = "k" * 32
    Session(app, store=client, key_prefix="forks:", store_timeout=20)

    @app.post("/count")
    def count() -> Any:
        return {"n": session.update_atomic("n", lambda n: n + 1, 0)}

    browser = app.test_client()

    def ask() -> Any:
        return browser.post("/count").json["n"]

    return [ask(), CChild(ask).result(), ask(), CChild(ask).result()]


if __name__ == "__main__":
    scenario: Callable[[str, Path], Any] = globals()[sys.argv[1]]
    print(json.dumps(scenario(sys.argv[2], Path(sys.argv[3]))))
