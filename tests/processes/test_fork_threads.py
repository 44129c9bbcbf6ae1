"""The effects of a server on a store: forks, many threads, interrupts."""

from __future__ import annotations

import contextvars
import gc
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
from pymongo import MongoClient
from pymongo import _csot as pymongo_time
from redis import BlockingConnectionPool, Redis
from redis.connection import AbstractConnection

from flask_gsession.errors import StoreUnavailable
from flask_gsession.events import SessionRefused
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.base import new_version
from flask_gsession.stores.redis.pool import _BoundedSocket
from flask_gsession.stores.sqlite import file as sqlite
from flask_gsession.testing import a_record
from tests.harness.forking import DEADLINE, PATIENCE, Child, Gate, gates, get, make_site, post
from tests.harness.servers import RedisServer

OPTIONS = StoreOptions(timeout=PATIENCE)

on_linux = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="needs /proc to see open files"
)


@pytest.fixture(params=["sqlite", "redis", "mongodb"])
def shared_url(request: pytest.FixtureRequest) -> str:
    """A `SESSION_STORE` URL of each kind that several processes can share."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


# Forks ------------------------------------------------------------------------------------------


def test_parent_and_child_work_in_parallel(shared_url: str, store_prefix: str) -> None:
    site = make_site(shared_url, store_prefix)
    cookie = site.log_in("alice")  # a connection is open
    each = 25

    def work(name: str) -> list[int]:
        client = site.client(cookie)
        post(client, f"/put/{name}")
        return [post(client, "/count")["count"] for _ in range(each)]

    children = [Child(lambda name=name: work(name)) for name in ("first", "second")]
    mine = work("parent")
    counts = [*mine, *(count for child in children for count in child.result())]
    assert sorted(counts) == list(range(1, 3 * each + 1))
    expected = dict.fromkeys(("user", "first", "second", "parent"), "alice")
    assert get(site.client(cookie), "/all") == {**expected, "n": 3 * each}
    site.ext.close(site.app)


def test_a_child_of_a_child_works_too(shared_url: str, store_prefix: str) -> None:
    site = make_site(shared_url, store_prefix)
    cookie = site.log_in("alice")

    def grandchild() -> dict[str, Any]:
        return post(site.client(cookie), "/count")

    def child() -> list[Any]:
        before = post(site.client(cookie), "/count")
        below = Child(grandchild).result()
        return [before["count"], below["count"], post(site.client(cookie), "/count")["count"]]

    assert Child(child).result() == [1, 2, 3]
    assert post(site.client(cookie), "/count")["count"] == 4
    site.ext.close(site.app)


def test_a_child_outlives_the_connections_of_its_parent(shared_url: str, store_prefix: str) -> None:
    """Everybody sees the writes of the child after its parent closed."""
    site = make_site(shared_url, store_prefix)
    cookie = site.log_in("parent")
    with gates(2) as (child_is_at_work, parent_has_closed):

        def child() -> list[str]:
            first = site.log_in("child")
            child_is_at_work.open()
            parent_has_closed.wait()
            return [first, *(site.log_in("child") for _ in range(10))]

        running = Child(child)
        child_is_at_work.wait()
        site.ext.close(site.app)
        parent_has_closed.open()
        cookies = running.result()
    # The same application opens new connections.
    for each in cookies:
        assert get(site.client(each), "/all") == {"user": "child"}
    assert get(site.client(cookie), "/all") == {"user": "parent"}
    site.ext.close(site.app)


def test_a_parent_outlives_its_child(shared_url: str, store_prefix: str) -> None:
    """A child that closes and ends takes nothing with it."""
    site = make_site(shared_url, store_prefix)
    cookie = site.log_in("alice")

    def child() -> None:
        post(site.client(cookie), "/count")
        site.ext.close(site.app)

    for number in (1, 2, 3):
        Child(child).result()
        assert get(site.client(cookie), "/all")["n"] == number
        late = site.log_in("bob")
        assert Child(lambda late=late: get(site.client(late), "/all")).result() == {"user": "bob"}
    site.ext.close(site.app)


@pytest.mark.parametrize("driver", ["redis", "mongodb"])
def test_a_client_that_was_passed_in_survives_a_fork(
    driver: str, request: pytest.FixtureRequest, store_prefix: str
) -> None:
    """The drivers look after their own clients; we must not stand in the way."""
    url = request.getfixturevalue(f"{driver}_url")
    client: Any = (
        Redis.from_url(url, socket_timeout=PATIENCE) if driver == "redis" else MongoClient(url)
    )
    site = make_site(client, store_prefix)
    cookie = site.log_in("alice")

    def child() -> int:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="MongoClient opened before fork")
            return sum(post(site.client(cookie), "/count")["count"] for _ in range(3))

    assert Child(child).result() == 1 + 2 + 3
    assert post(site.client(cookie), "/count")["count"] == 4
    site.ext.close(site.app)
    client.close()


@pytest.mark.parametrize("driver", ["sqlite", "redis", "mongodb"])
def test_a_fork_beside_a_busy_thread(
    driver: str,
    request: pytest.FixtureRequest,
    store_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other thread's activity doesn't matter."""
    monkeypatch.setattr(sqlite, "_WAIT_TO_FORK", PATIENCE)
    site = make_site(request.getfixturevalue(f"{driver}_url"), store_prefix)
    cookie = site.log_in("alice")
    busy, over = threading.Event(), threading.Event()

    def keep_busy() -> None:
        client = site.client(site.log_in("bob"))
        while not over.is_set():
            post(client, "/count")
            busy.set()

    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(keep_busy)
        try:
            assert busy.wait(DEADLINE)
            for number in range(1, 11):
                child = Child(lambda: post(site.client(cookie), "/count"))
                assert child.result() == {"user": "alice", "count": number}
        finally:
            over.set()
        thread.result()
    site.ext.close(site.app)


def test_a_fork_while_another_thread_connects(
    mongodb_url: str, store_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads don't survive a fork, and their locks would stay locked in the child."""
    parent = os.getpid()
    connecting, go_on = threading.Event(), threading.Event()

    def slow_client(*args: Any, **options: Any) -> Any:
        if os.getpid() == parent:
            connecting.set()
            assert go_on.wait(DEADLINE)
        return MongoClient(*args, **options)

    monkeypatch.setattr("flask_gsession.stores.mongodb.driver.MongoClient", slow_client)
    site = make_site(mongodb_url, store_prefix)
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(site.log_in, "parent")
        try:
            assert connecting.wait(DEADLINE)
            cookie = Child(lambda: site.log_in("child")).result()
        finally:
            go_on.set()
        assert get(site.client(thread.result()), "/all") == {"user": "parent"}
    assert get(site.client(cookie), "/all") == {"user": "child"}
    site.ext.close(site.app)


def test_processes_that_start_together_make_one_file(tmp_path: Path) -> None:
    """No race for the file, its folder, its mode, its WAL or its table."""
    for round_ in range(5):
        path = tmp_path / f"{round_}" / "instance" / "sessions.sqlite3"
        with gates(1) as (start,):

            def open_and_write(path: Path = path, start: Gate = start) -> str:
                start.wait()
                store = open_store(f"sqlite:///{path}", OPTIONS)[0]
                record = a_record(time.time)
                store.create(record)
                return record.key

            children = [Child(open_and_write) for _ in range(8)]
            for _ in children:
                start.open()
            keys = [child.result() for child in children]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        store = open_store(f"sqlite:///{path}", OPTIONS)[0]
        assert all(store.load(key) for key in keys)
        store.close()


def test_a_child_forked_while_the_file_is_made(tmp_path: Path) -> None:
    """The lock of the folder ends with the making, not with the child, which has it open too."""
    with gates(1) as (end,):
        with sqlite._folder_lock(tmp_path, 0.0) as alone:
            assert alone
            child = Child(end.wait)
        try:
            with sqlite._folder_lock(tmp_path, 0.0) as alone:
                assert alone
        finally:
            end.open()
            child.result()


def test_making_the_file_waits_for_its_readers(sqlite_url: str) -> None:
    """The switch to WAL mode needs the file for itself for a moment."""
    store = open_store(sqlite_url, OPTIONS)[0]
    record = a_record(time.time)
    path = sqlite_url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM sqlite_master").fetchall()
        looking = threading.Timer(0.3, other.execute, ["COMMIT"])
        looking.start()
        store.create(record)
        looking.join()
    assert store.load(record.key) == record
    store.close()


def test_a_second_connection_keeps_the_locks_of_the_first(sqlite_url: str) -> None:
    """Another process that comes and goes must not take itself for the last one.

    Closing any descriptor of a file gives up all POSIX locks that the process has on it. SQLite
    would not notice; the other process would remove the log in which this one goes on writing.
    """
    store = open_store(sqlite_url, OPTIONS)[0]
    together = threading.Barrier(2)

    def read_while_another_reads() -> None:
        together.wait(DEADLINE)
        for _ in range(50):
            store.load("none")

    with ThreadPoolExecutor(2) as pool:
        for running in [pool.submit(read_while_another_reads) for _ in range(2)]:
            running.result()

    # Two at once for certain: a second store of this process on the same file.
    second = open_store(sqlite_url, OPTIONS)[0]
    early = a_record(time.time)
    store.create(early)
    assert second.load(early.key) == early
    assert in_a_fresh_process(sqlite_url, [early.key]) == 1
    keys = []
    for _ in range(10):
        record = a_record(time.time)
        store.create(record)
        keys.append(record.key)
    assert in_a_fresh_process(sqlite_url, keys) == len(keys)
    store.close()
    second.close()


def in_a_fresh_process(url: str, keys: list[str]) -> int:
    """How many of the keys a process finds that shares nothing with this one but the file."""
    code = (
        "import sys\n"
        "from flask_gsession.stores import StoreOptions, open_store\n"
        f"store = open_store({url!r}, StoreOptions(timeout={PATIENCE}))[0]\n"
        "print(sum(store.load(key) is not None for key in sys.argv[1:]))\n"
        "store.close()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *keys],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return int(run.stdout)


# Threads ----------------------------------------------------------------------------------------


def test_a_hundred_threads_on_a_pool_of_five(shared_url: str, store_prefix: str) -> None:
    """They wait for each other; nobody gets an error, or somebody else's session."""
    site = make_site(shared_url, store_prefix, pool_max=5)
    start = threading.Barrier(100)

    def browse(user: str) -> dict[str, Any]:
        client = site.client()
        start.wait(DEADLINE)
        post(client, f"/login/{user}")
        post(client, f"/put/{user}")
        return get(client, "/all")

    users = [f"user{number}" for number in range(100)]
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(browse, users))
    assert answers == [{"user": user, user: user} for user in users]
    site.ext.close(site.app)


def test_every_connection_goes_back_into_the_pool(redis_url: str, store_prefix: str) -> None:
    """Also after refusals, lost races and errors of the server."""
    pool = BlockingConnectionPool.from_url(
        redis_url, max_connections=5, timeout=PATIENCE, socket_timeout=PATIENCE
    )
    site = make_site(Redis(connection_pool=pool), store_prefix)
    cookie = site.log_in("alice")

    def work() -> None:
        client = site.client(cookie)
        for number in range(5):
            post(client, "/count")
            post(client, f"/put/{number}")
            site.client("no cookie of ours").get("/all")

    with ThreadPoolExecutor(20) as threads:
        for running in [threads.submit(work) for _ in range(20)]:
            running.result()
    with Redis.from_url(redis_url) as client:
        (name,) = client.scan_iter(f"{store_prefix}*")
        client.rpush(f"{store_prefix}list", "not a string")
        client.rename(f"{store_prefix}list", name)
    assert get(site.client(cookie), "/all") == {}  # WRONGTYPE: refused
    assert pool.pool.qsize() == 5
    assert len(pool._connections) <= 5
    pool.disconnect()


# Interrupts -------------------------------------------------------------------------------------


class Interrupt(BaseException):
    """As KeyboardInterrupt, SystemExit or gevent.Timeout: passes every `except Exception`."""


class PoliteInterrupt(Exception):
    """As time limits that are raised as ordinary exceptions."""


class Interrupter:
    """Calls a function, and raises from a signal handler in the middle of it.

    :param kind: the exception to raise. :param function: called 20 times without an interrupt
    first, to know how long it takes.
    """

    # Code that interrupts can break, whatever we do: Python's own locks and finalizers, and the
    # handshake of redis-py, where hiredis crashes when a handler raises while it packs a number.
    SPARED_MODULES = ("queue", "threading", "weakref", "_weakrefset", "logging", "importlib")
    SPARED_FUNCTIONS = ("__del__", "on_connect_check_health")

    def __init__(self, kind: type[BaseException], function: Callable[[], object]) -> None:
        self.interrupts = 0
        self._kind = kind
        self._function = function
        self._armed = False
        self._usual = median(self._timed() for _ in range(20))

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGALRM, self._strike)
        # Cut-off sockets and finalizers complain, and have nobody to complain to.
        self._hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)
        gc.collect()
        sys.unraisablehook = self._hook

    def _strike(self, number: int, frame: FrameType | None) -> None:
        if not self._armed:
            return
        while frame is not None:
            module = str(frame.f_globals.get("__name__")).partition(".")[0]
            if module in self.SPARED_MODULES or frame.f_code.co_name in self.SPARED_FUNCTIONS:
                signal.setitimer(signal.ITIMER_REAL, 2e-5)  # a little later, then
                return
            frame = frame.f_back
        self._armed = False
        self.interrupts += 1
        raise self._kind

    def _timed(self) -> float:
        started = time.monotonic()
        self._function()
        return time.monotonic() - started

    def call(self) -> None:
        """Call the function once. Catch an interrupt, and the errors that it causes in Flask."""
        try:
            self._armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.05, 1.1) * self._usual)
            # In a context of its own, because Flask may be unable to tidy up there.
            contextvars.copy_context().run(self._function)
        except BaseException as error:
            if not is_due_to(self._kind, error):
                raise
        finally:
            self._armed = False


def is_due_to(kind: type[BaseException], error: BaseException | None) -> bool:
    """Whether an error is of a kind, or was raised while one of that kind was handled."""
    while error is not None and not isinstance(error, kind):
        error = error.__context__
    return error is not None


@pytest.mark.parametrize(
    ("driver", "kind", "interrupts"),
    [
        ("redis", Interrupt, 300),
        ("redis", PoliteInterrupt, 300),
        ("sqlite", Interrupt, 100),
        ("mongodb", Interrupt, 60),
    ],
)
def test_interrupts_never_bring_up_another_session(
    driver: str,
    kind: type[BaseException],
    interrupts: int,
    request: pytest.FixtureRequest,
    store_prefix: str,
) -> None:
    """An interrupted connection may still get its answer: it must not go to the next request."""
    site = make_site(request.getfixturevalue(f"{driver}_url"), store_prefix, pool_max=1000)
    refused: list[SessionRefused] = []
    site.ext.on(SessionRefused, refused.append)
    cookies = {user: site.log_in(user) for user in ("alice", "bob", "carol", "dave")}
    answers = 0

    def ask() -> None:
        nonlocal answers
        user = random.choice(list(cookies))
        client = site.client(cookies[user])
        if random.random() < 0.5:
            response = client.get("/all")
        else:
            response = client.post(random.choice(["/count", f"/put/{user}"]))
        if response.status_code == 200:
            answers += 1
            assert response.json is not None
            assert {"user", "n", "count", user} >= set(response.json)
            assert response.json["user"] == user
            assert response.json.get(user, user) == user

    with Interrupter(kind, ask) as interrupter:
        while interrupter.interrupts < interrupts:
            interrupter.call()
    for _ in range(20):
        ask()
    assert answers >= 20 + 20  # those before the first interrupt, and those after the last
    assert not refused
    site.ext.close(site.app)


@contextmanager
def slow_to_answer(server: RedisServer) -> Iterator[None]:
    """In the block the server takes commands; it answers a while after the block."""
    server.pause()
    try:
        yield
    finally:
        threading.Timer(0.2, server.resume).start()


def test_an_answer_that_nobody_waited_for_goes_to_nobody(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt strikes between a command and its answer; the next request comes at once."""
    site = make_site(own_redis.url, "test:")
    alice, bob = site.log_in("alice"), site.log_in("bob")

    def interrupt(self: _BoundedSocket, request: bytes) -> bytes:
        self.sendall(request)
        raise Interrupt

    with slow_to_answer(own_redis), monkeypatch.context() as patch:
        patch.setattr(_BoundedSocket, "exchange", interrupt)
        with pytest.raises(Interrupt):
            get(site.client(alice), "/all")
    assert get(site.client(bob), "/all") == {"user": "bob"}
    assert get(site.client(alice), "/all") == {"user": "alice"}
    site.ext.close(site.app)


@pytest.mark.parametrize("path", ["/all", "/count", "/put/color"])
def test_an_answer_to_another_call_is_detected(path: str, own_redis: RedisServer) -> None:
    """Whoever shares the pool has left a connection out of step: a record knows whose it is."""
    pool = BlockingConnectionPool.from_url(own_redis.url, socket_timeout=PATIENCE)
    site = make_site(Redis(connection_pool=pool), f"test-{path}:")
    alice = site.log_in("alice")
    with Redis.from_url(own_redis.url) as client:
        (name,) = client.scan_iter(f"test-{path}:*")
    bob = site.log_in("bob")
    with slow_to_answer(own_redis):
        connection = pool.get_connection()
        connection.send_command("GET", name)
        pool.release(connection)
    if path == "/all":
        assert get(site.client(bob), path) == {"user": "bob"}
    else:
        assert post(site.client(bob), path)["user"] == "bob"
        assert get(site.client(bob), "/all")["user"] == "bob"
    assert get(site.client(alice), "/all") == {"user": "alice"}
    pool.disconnect()


def test_the_success_of_another_write_is_not_taken_for_ours(own_redis: RedisServer) -> None:
    """Or a lost race would look like a stored session."""
    pool = BlockingConnectionPool.from_url(own_redis.url, socket_timeout=PATIENCE)
    store = open_store(Redis(connection_pool=pool), OPTIONS)[0]
    record = a_record(time.time)
    store.create(record)
    mine = record._replace(version=new_version(), payload=b"mine")
    with slow_to_answer(own_redis):
        connection = pool.get_connection()
        connection.send_command("ECHO", b"K" + new_version().to_bytes(8, "big"))
        pool.release(connection)
    with pytest.raises(StoreUnavailable, match="a reply was lost"):
        store.save(mine, new_version())
    assert store.load(record.key) == record
    pool.disconnect()


def test_an_interrupt_while_connecting_harms_nobody_else(
    redis_url: str, store_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that was not fully set up, its database not selected, must not be kept."""
    url = urlsplit(redis_url)._replace(path="/3").geturl()
    site = make_site(url, store_prefix)
    read_response = AbstractConnection.read_response
    interrupts = 0

    def read_or_interrupt(self: AbstractConnection, *args: Any, **options: Any) -> Any:
        nonlocal interrupts
        if interrupts < 3:
            interrupts += 1
            raise Interrupt
        return read_response(self, *args, **options)

    monkeypatch.setattr(AbstractConnection, "read_response", read_or_interrupt)
    for _ in range(3):
        with pytest.raises(Interrupt):
            site.log_in("alice")
    cookies = [site.log_in("bob") for _ in range(10)]
    for cookie in cookies:
        assert get(site.client(cookie), "/all") == {"user": "bob"}
    with Redis.from_url(redis_url) as database_0, Redis.from_url(url) as database_3:
        pattern = f"{store_prefix}*"
        assert not list(database_0.scan_iter(pattern))
        keys = list(database_3.scan_iter(pattern))
        database_3.unlink(*keys)
    assert len(keys) == len(cookies)
    site.ext.close(site.app)


# Leftovers --------------------------------------------------------------------------------------


def open_files() -> dict[str, str]:
    """This process's file descriptors, with their targets."""
    files = {}
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor that listed the directory
            files[descriptor] = os.readlink(f"/proc/self/fd/{descriptor}")
    return files


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true in some time."""
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_an_interrupt_never_leaves_a_thread_without_time(mongodb_url: str) -> None:
    """At the beginning of any function around the driver's call: the next call has all its time."""
    store = open_store(mongodb_url, OPTIONS)[0]
    record = a_record(time.time)
    store.create(record)
    store.load(record.key)
    before = pymongo_time.DEADLINE.get()
    due = calls = 0

    def strike(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        module = frame.f_globals.get("__name__", "")
        ours = module.startswith(("flask_gsession", "contextlib", "pymongo._csot"))
        if event == "call" and ours and frame.f_code.co_name != "__del__":
            calls += 1
            if calls == due:
                raise Interrupt

    def load_and_look() -> None:
        with suppress(Interrupt):
            sys.setprofile(strike)
            try:
                store.load(record.key)
            finally:
                sys.setprofile(None)
        assert pymongo_time.DEADLINE.get() == before, due

    while calls >= due:
        due, calls = due + 1, 0
        contextvars.copy_context().run(load_and_look)
    assert due > 5
    assert store.load(record.key) == record
    store.delete(record.key)
    store.close()


@on_linux
def test_close_leaves_no_descriptor_and_no_thread(shared_url: str, store_prefix: str) -> None:

    sites = []  # kept, since closing must not depend on the garbage collector

    def use_and_close() -> set[tuple[str, str]]:
        """The files that were open just before."""
        site = make_site(shared_url, store_prefix)
        sites.append(site)
        with ThreadPoolExecutor(10) as pool:
            list(pool.map(site.log_in, "abcdefghij"))
        opened = set(open_files().items())
        site.ext.close(site.app)
        return opened

    use_and_close()  # whatever is opened once per process is open now
    for last_try in (False, False, True):  # the fixtures' own clients may just open something
        gc.collect()
        files, threads = set(open_files().items()), set(threading.enumerate())

        def is_as_before(files: Any = files, threads: Any = threads) -> bool:
            return set(open_files().items()) <= files and set(threading.enumerate()) <= threads

        for _ in range(3):
            assert use_and_close() - files, "no connection was open: that shows nothing"
        if eventually(is_as_before):
            return
        assert not last_try, "threads or files were left behind"
