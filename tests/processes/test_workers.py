"""Sessions under gunicorn: several processes, of each kind of worker, hammered in parallel.

Nothing here measures time: on a slow machine the tests take longer, but find the same faults.
"""

import random
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
from pymongo import MongoClient
from redis import Redis

from tests.harness.gunicorn import (
    DEADLINE,
    GEVENT,
    GTHREAD,
    THREADS,
    Answer,
    Gunicorn,
    Stream,
    in_parallel,
    is_alive,
)
from tests.harness.marks import long
from tests.harness.servers import mongo_server, redis_server, with_database


class Setup(NamedTuple):
    """One way to run gunicorn."""

    store: str
    workers: int
    options: tuple[str, ...] = ()
    warm: bool = False
    near: float = 0

    def __str__(self) -> str:
        kind = "-".join(option.lstrip("-") for option in self.options) or "sync"
        return f"{self.store}-{self.workers}-{kind}{'-near' if self.near else ''}"


NEAR = 0.5  # seconds
STORES = ["sqlite", "redis", "mongodb"]
SETUPS = [
    *(Setup(store, workers) for workers in (2, 4) for store in STORES),
    *(Setup(store, 2, GTHREAD) for store in STORES),
    *(Setup(store, 2, GEVENT) for store in STORES),
    *(Setup(store, 2, ("--preload",), warm=True) for store in STORES),
    Setup("redis", 2, GEVENT, near=NEAR),
    Setup("redis", 2, ("--preload",), warm=True, near=NEAR),
]
RARE = [
    *(Setup(store, 2) for store in STORES),
    *(Setup(store, 2, GTHREAD) for store in ("sqlite", "mongodb")),
    *(Setup(store, 2, GEVENT) for store in ("redis", "mongodb")),
    *(Setup(store, 2, ("--preload",), warm=True) for store in ("sqlite", "redis")),
]
PRELOADED = [setup for setup in SETUPS if setup.warm]


@pytest.fixture(scope="module", params=long(SETUPS, RARE), ids=str)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gunicorn]:
    """A gunicorn of each setup in turn; at its end it must stop cleanly, with a clean log."""
    setup: Setup = request.param
    folder = tmp_path_factory.mktemp("gunicorn")
    name = secrets.token_hex(6)
    environment = {"WORKERS_PREFIX": f"test-{name}:"}
    if setup.store == "sqlite":
        environment["WORKERS_STORE"] = f"sqlite:///{folder}/sessions.sqlite3"
    elif setup.store == "redis":
        environment["WORKERS_STORE"] = redis_server().url
    else:
        environment["WORKERS_STORE"] = with_database(mongo_server().url, f"test_{name}")
    if setup.near:
        environment["WORKERS_NEAR"] = str(setup.near)
    if setup.warm:
        environment["WORKERS_WARM"] = "yes"
    try:
        with Gunicorn(
            folder, *setup.options, workers=setup.workers, environment=environment
        ) as gunicorn:
            yield gunicorn
            must_stop_cleanly(gunicorn)
    finally:
        forget(setup.store, name)


def must_stop_cleanly(server: Gunicorn) -> None:
    """Gunicorn ends by itself with all its workers, and nothing worrying was ever logged."""
    assert server.stop() == 0, server.log
    assert not any(is_alive(pid) for pid in server.pids())
    for word in ("Traceback", "ERROR", "WARNING", "Warning", "Exception ignored", "CRITICAL"):
        assert word not in server.log, server.log


def forget(store: str, name: str) -> None:
    """Remove the workers' data from a server that may be the user's."""
    if store == "redis":
        with Redis.from_url(redis_server().url, socket_timeout=10) as client:
            for key in client.scan_iter(f"test-{name}:*", count=1000):
                client.unlink(key)
    elif store == "mongodb":
        with MongoClient(mongo_server().url, timeoutMS=10_000) as mongo:
            mongo.drop_database(f"test_{name}")


def test_an_atomic_counter_counts_every_request(server: Gunicorn) -> None:
    cookie = server.log_in("alice")
    answers: list[Answer] = []

    def count() -> list[Answer]:
        return [server.post("/count", cookie) for _ in range(40)]

    for _ in range(10):
        answers += chain(*in_parallel(*[count] * THREADS))
        if len({answer.worker for answer in answers}) > 1:
            break
    else:
        pytest.fail("one worker answered everything: that shows nothing")
    counts = sorted(answer.body["count"] for answer in answers)
    assert counts == list(range(1, len(answers) + 1))
    assert server.get("/all", cookie).body == {"user": "alice", "count": len(answers)}


def test_a_counter_under_a_lock_counts_every_request(server: Gunicorn) -> None:
    """Eight clients that lock, and one that need not wait for them."""
    cookie = server.log_in("alice")

    def count() -> list[int]:
        return [server.post("/count-locked", cookie).body["count"] for _ in range(4)]

    def look() -> list[int]:
        for _ in range(4):
            assert server.get("/whoami", cookie).body["user"] == "alice"
        return []

    counts = sorted(chain(*in_parallel(look, *[count] * 8)))
    assert counts == list(range(1, 33))
    assert server.get("/all", cookie).body == {"user": "alice", "locked": 32}


def test_keys_written_in_parallel_all_survive(server: Gunicorn) -> None:
    cookie = server.log_in("alice")
    per_thread = 15

    def write(thread: int) -> dict[str, int]:
        mine = {f"{thread}-{number}": thread * 1000 + number for number in range(per_thread)}
        for key, value in mine.items():
            server.post(f"/put/{key}/{value}", cookie)
        return mine

    written = in_parallel(*(lambda thread=thread: write(thread) for thread in range(THREADS)))
    expected = {"user": "alice"}
    for mine in written:
        expected |= mine
    assert server.get("/all", cookie).body == expected


def test_an_answer_is_always_about_the_owner_of_its_cookie(server: Gunicorn) -> None:
    users = [f"user{number}" for number in range(12)]

    def browse(mine: list[str], seed: int) -> None:
        cookies = {user: server.log_in(user) for user in mine}
        order = random.Random(seed)
        for number in range(20):
            user = order.choice(mine)
            if number % 2:
                assert server.post(f"/put/{user}/{number}", cookies[user]).body == {"user": user}
            else:
                assert server.get("/whoami", cookies[user]).body["user"] == user
        for user in mine:
            assert set(server.get("/all", cookies[user]).body) <= {"user", user}

    in_parallel(*(lambda part=part: browse(users[part::THREADS], part) for part in range(THREADS)))


def test_a_logout_in_the_middle_of_writes_is_the_end(server: Gunicorn) -> None:
    cookie = server.log_in("alice")
    logged_out = threading.Event()

    def write(thread: int) -> None:
        """Write until the logout was answered, and a little longer."""
        deadline = time.monotonic() + DEADLINE
        number = refused = 0
        while refused < 5:
            assert time.monotonic() < deadline
            ended = logged_out.is_set()
            answer = server.ask("POST", f"/put/{thread}-{number % 20}/{number}", cookie)
            # Beside the logout, either is fine: to find no session, or that the write is dropped.
            assert answer.status == 401 or (answer.status == 200 and not ended), answer
            assert not answer.cookie, "a cookie for a session that has ended"
            number += 1
            refused += ended

    def log_out() -> None:
        try:
            for number in range(10):
                server.post(f"/put/leaver-{number}/1", cookie)
            assert server.post("/logout", cookie).cookie == ""
        finally:
            logged_out.set()

    in_parallel(log_out, *(lambda t=t: write(t) for t in range(THREADS - 1)))
    assert server.get("/whoami", cookie).body == {"user": None, "handle": None}
    assert server.get("/all", cookie).body == {}


@pytest.mark.parametrize(
    "server", long(PRELOADED, [it for it in RARE if it.warm]), ids=str, indirect=True
)
def test_a_session_from_before_the_fork_is_everywhere(server: Gunicorn) -> None:
    cookie = server.get("/warm-cookie").body["cookie"]
    assert cookie

    def look() -> list[Answer]:
        return [server.get("/whoami", cookie) for _ in range(10)]

    answers = list(chain(*in_parallel(*[look] * THREADS)))
    assert {answer.body["user"] for answer in answers} == {"early"}


# The default: no setting at all ---------------------------------------------------------------


@pytest.fixture
def default_server(tmp_path: Path) -> Iterator[Gunicorn]:
    """Four workers with threads that all make and open the default store as they start."""
    environment = {"WORKERS_PREFIX": "gsession:", "WORKERS_WARM": "yes"}
    with Gunicorn(tmp_path, *GTHREAD, workers=4, environment=environment) as gunicorn:
        yield gunicorn


def test_the_default_store_is_a_file_for_all_workers(default_server: Gunicorn) -> None:
    """Made without a race, private, in WAL mode; and a reload under load loses nothing."""
    server = default_server
    path = server.instance / "gsession.sqlite3"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        # Each worker stored its own session as it started.
        assert db.execute("SELECT count(*) FROM gsession").fetchone() == (4,)

    shared = server.log_in("alice")

    def work(thread: int) -> list[str]:
        cookies = []
        for number in range(25):
            cookies.append(server.log_in(f"{thread}-{number}"))
            server.post("/count", shared)
        return cookies

    def reload() -> list[str]:
        server.reload()
        return []

    with Stream(server.port, shared) as stream:  # a worker that is to end doesn't wait for it
        made = in_parallel(*(lambda t=t: work(t) for t in range(THREADS)), reload)
        assert stream.response.read().endswith(b"\n\n")
    assert server.get("/all", shared).body["count"] == THREADS * 25
    for thread, cookies in enumerate(made):
        for number, cookie in enumerate(cookies):
            assert server.get("/whoami", cookie).body["user"] == f"{thread}-{number}"
    must_stop_cleanly(server)
    for file in path.parent.glob("gsession.sqlite3*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_page_gets_changes_of_any_worker(server: Gunicorn) -> None:
    cookie = server.log_in("alice")
    first = server.get("/live/state", cookie).body
    with Stream(server.port, cookie) as stream:
        if not first["stream"]:  # a worker with one thread: the page polls
            assert stream.response.status == 501
        else:
            assert stream.response.status == 200
            assert stream.state() == {"who": "", "keys": {}}
            server.post("/count", cookie)
            assert stream.state()["keys"].keys() == {"count"}
            for _ in range(2 * THREADS):  # a page that is left makes room at once
                with Stream(server.port, cookie) as another:
                    assert another.response.status == 200
    server.post("/count", cookie)
    second = server.get("/live/state", cookie).body
    assert first["keys"].keys() != second["keys"].keys() == {"count"}
    with Stream(server.port, cookie) as stream:
        server.post("/logout", cookie)
        if first["stream"]:
            while stream.state()["who"] is not None:
                pass
            assert stream.response.read().strip() == b""
    assert server.get("/live/state", cookie).body["who"] is None
