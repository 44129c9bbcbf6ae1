"""Streams of real gunicorns: clients that are killed, read nothing or attack, and lost stores."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness.apps import until
from tests.harness.gunicorn import DEADLINE, Gunicorn, in_parallel
from tests.harness.servers import MongoServer, RedisServer, Server
from tests.harness.stream_clients import Page, stream_clients
from tests.harness.uwsgi import Uwsgi

STREAMING = ["gthread", "gevent"]
STREAMS = 200
ALLOWED = 3  # streams of one user in the tests of attacks
WORKERS = {
    "sync": (),
    "gthread": ("--worker-class", "gthread", "--threads", str(2 * STREAMS + 20)),
    "gevent": ("--worker-class", "gevent", "--worker-connections", str(3 * STREAMS)),
}


@contextmanager
def serving(folder: Path, kind: str, url: str, prefix: str, **more: object) -> Iterator[Gunicorn]:
    """One worker of this kind."""
    environment = {
        "WORKERS_STORE": url,
        "WORKERS_PREFIX": prefix,
        **{f"WORKERS_{name.upper()}": str(value) for name, value in more.items()},
    }
    app = "tests.harness.live_app:create_app()"
    with Gunicorn(folder, *WORKERS[kind], workers=1, environment=environment, app=app) as server:
        yield server


@contextmanager
def attacked(folder: Path, kind: str, url: str, prefix: str) -> Iterator[Gunicorn]:
    """The same, also of gunicorn's default kind, or uWSGI."""
    if kind != "uwsgi":
        with serving(folder, kind, url, prefix, user_streams=ALLOWED) as server:
            yield server
        return
    configuration = (
        "[uwsgi]\nmodule = wsgi:app\nprocesses = 1\nenable-threads = true\nthreads = 20\n"
    )
    environment = {
        "WORKERS_STORE": url,
        "WORKERS_PREFIX": prefix,
        "WORKERS_USER_STREAMS": str(ALLOWED),
    }
    with Uwsgi(folder, configuration, environment, "tests.harness.live_app") as server:
        yield server


def slow_clients(port: int, own: str) -> ExitStack:
    """Clients that never end their requests; on uWSGI, more than it has threads."""
    opened = ExitStack()
    for _ in range(30):
        client = opened.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE))
        client.sendall(f"GET /live/stream HTTP/1.1\r\n{own}X-Slow: ".encode())
    return opened


def figures(server: Gunicorn) -> dict[str, Any]:
    return server.get("/figures").body


@pytest.mark.long
def test_clients_that_fail_say_why_and_leave_no_process() -> None:
    """A process that is left would fail a later test of the same worker, which is innocent."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        server: Any = SimpleNamespace(port=closed.getsockname()[1], log="said by the server")
    with (
        pytest.raises(AssertionError, match=r"(?s)ConnectionRefused.*said by the server"),
        stream_clients(server, ["one"], ["two"]),
    ):
        pass
    assert children() == []


def children() -> list[str]:
    """The command lines of the stream clients that this process runs, or hasn't waited for."""
    (pids,) = Path("/proc/self/task").glob(f"{os.getpid()}/children")
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids.read_text().split()]
    return [line for line in lines if "stream_clients" in line or not line]


def none_left(server: Gunicorn) -> bool:
    now = figures(server)
    return not now["streams"] and not now["watches"]


@pytest.mark.long
@pytest.mark.parametrize("kind", STREAMING)
def test_streams_of_killed_clients_end(
    kind: str, tmp_path: Path, redis_url: str, store_prefix: str
) -> None:
    """All at once or in turn; then threads, files and memory are as after the first time."""
    with serving(tmp_path, kind, redis_url, store_prefix) as server:
        cookies = [server.log_in(str(number)) for number in range(STREAMS)]
        quarters = [cookies[start::4] for start in range(4)]
        files, after = figures(server)["files"], []
        for in_turn in (False, False, True):
            with stream_clients(server, *quarters) as clients:
                assert figures(server)["streams"] == STREAMS
                for number, each in enumerate(clients, start=1):
                    each.kill()
                    if in_turn:
                        left = STREAMS - number * len(quarters[0])
                        until(lambda left=left: figures(server)["streams"] == left)  # type: ignore[misc]
            until(lambda: none_left(server))
            after.append(figures(server))
        assert after[2]["threads"] <= after[0]["threads"] + 1
        assert after[2]["files"] < files + STREAMS * 3 / 4  # the store keeps up to 100 connections
        assert after[2]["kilobytes"] < after[0]["kilobytes"] * 1.2
        assert server.stop() == 0


def stop_gracefully(server: Server) -> None:
    """As an administrator does."""
    server._running().terminate()
    server._running().wait()
    server.kill()


KEEPS = ("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture(params=["redis", "mongodb"])
def restarted(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that a test can restart without losing data."""
    with RedisServer(*KEEPS) if request.param == "redis" else MongoServer() as server:
        yield server


@pytest.mark.long
@pytest.mark.parametrize("kind", STREAMING)
def test_no_hint_is_lost_by_a_restart_of_the_store(
    kind: str, restarted: Server, tmp_path: Path, store_prefix: str
) -> None:
    """While the store is away, the near cache serves nothing."""
    near = {"near": 1.0} if isinstance(restarted, RedisServer) else {}
    with (
        serving(tmp_path, kind, restarted.url, store_prefix, timeout=2, **near) as server,
        ExitStack() as opened,
    ):
        cookies = [server.log_in(str(number)) for number in range(10)]
        for number, cookie in enumerate(cookies):
            cookies[number] = server.post(f"/bind/{number}", cookie).cookie or cookie
        pages = [opened.enter_context(Page(server.port, cookie)) for cookie in cookies]

        def are_right() -> bool:
            """Whether each page shows the current state."""
            states = [server.get("/live/state", cookie).body for cookie in cookies]
            pairs = zip(pages, states, strict=True)
            return all(page.state and state | page.state == state for page, state in pairs)

        until(are_right)
        for number, stop in enumerate([Server.kill, stop_gracefully, Server.kill]):
            stop(restarted)
            until(lambda: server.ask("GET", "/whoami", cookies[0]).status == 503)
            assert server.ask("GET", "/whoami", cookies[0]).status == 503
            restarted.start()
            until(lambda: server.ask("POST", "/count", cookies[0]).status == 200)
            for cookie in cookies:
                server.post("/count", cookie)
            server.post(f"/publish/0/{number}")
            assert server.get("/all", cookies[1]).body["count"] == number + 1
            until(are_right)
        until(lambda: pages[0].numbers == [0, 1, 2])
        assert {status for page in pages for status in page.refused} <= {503}
        assert "Traceback" not in server.log, server.log
        assert server.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("kind", STREAMING)
def test_pages_notice_that_a_store_came_back_empty(
    kind: str, tmp_path: Path, store_prefix: str
) -> None:
    with (
        RedisServer() as redis,
        serving(tmp_path, kind, redis.url, store_prefix, timeout=2, near=1.0) as server,
        Page(server.port, server.log_in("ada")) as page,
    ):
        until(lambda: page.state)
        redis.kill()
        redis.start()
        until(lambda: page.state == {"who": None})
        until(lambda: none_left(server))


@pytest.mark.long
@pytest.mark.parametrize("kind", STREAMING)
def test_a_flood_of_messages_beside_clients_that_read_nothing(
    kind: str, tmp_path: Path, redis_url: str, store_prefix: str
) -> None:
    """The others get the last message, memory stays bounded, and the deaf are cut off."""
    with serving(tmp_path, kind, redis_url, store_prefix, heartbeat=1) as server:
        cookie = server.log_in("ada")
        cookie = server.post("/bind/ada", cookie).cookie or cookie
        for _ in range(20):
            server.post("/publish/ada/0")
        with ExitStack() as opened:
            opened.enter_context(stream_clients(server, [cookie] * 3, deaf=True))
            pages = [opened.enter_context(Page(server.port, cookie)) for _ in range(5)]
            until(lambda: all(page.state for page in pages))
            assert figures(server)["streams"] == 8
            before = figures(server)["kilobytes"]

            def publish() -> set[int]:
                return {server.ask("POST", "/publish/ada/1").status for _ in range(150)}

            statuses = set().union(*in_parallel(*[publish] * 4))
            assert 200 in statuses <= {200, 503}
            server.post("/publish/ada/2")
            until(lambda: all(page.numbers[-1:] == [2] for page in pages))
            until(lambda: figures(server)["streams"] == len(pages))
            assert all(page.ids == sorted({*page.ids}) for page in pages)
            assert figures(server)["kilobytes"] < before + 30_000
        until(lambda: none_left(server))
        assert "flask_gsession" not in server.log, server.log  # gunicorn logs the end of the deaf
        assert server.stop() == 0


def ask(port: int, request: str, headers: str = "") -> int:
    """The status of a raw request, whose body may never end."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
        client.sendall(f"{request} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode())
        return int(client.recv(65_536)[9:12])


@pytest.mark.long
@pytest.mark.parametrize("kind", [*WORKERS, "uwsgi"])
def test_attacks_on_the_stream(
    kind: str, tmp_path: Path, redis_url: str, store_prefix: str
) -> None:
    """Each gets a refusal, and leaves nothing behind."""
    streams = kind != "sync"
    with attacked(tmp_path, kind, redis_url, store_prefix) as server:
        cookie = server.log_in("ada")
        own = f"Cookie: session={cookie}\r\n"
        path, port = "GET /live/stream", server.port
        good = 200 if streams else 501
        with slow_clients(port, own):
            time.sleep(0.5)  # the worker has them
        until(lambda: ask(port, path, own) == good)
        for headers, status in (
            ("", 401 if streams else 501),
            (f"Cookie: session={cookie[:-1]}\r\n", 401 if streams else 501),
            (f"{own}Origin: http://evil.example\r\n", 403),
            (f"{own}Sec-Fetch-Site: cross-site\r\n", 403),
            (f"{own}Last-Event-ID: {'9' * 3000}\r\n", good),
            (f"{own}Last-Event-ID: -1\r\n", good),
            (f"{own}Content-Length: 1000000\r\n", good),  # of which nothing comes
        ):
            assert ask(port, path, headers) == status, headers
            until(lambda: none_left(server))
        for method, status in (("HEAD", good), ("POST", 405), ("PUT", 405), ("OPTIONS", 200)):
            length = "" if method in ("HEAD", "OPTIONS") else "Content-Length: 0\r\n"
            assert ask(port, f"{method} /live/stream", own + length) == status
        until(lambda: none_left(server))
        if streams:
            with stream_clients(server, *[[cookie]] * ALLOWED):
                for _ in range(20):
                    assert ask(port, path, own) == 429
                assert figures(server)["streams"] == ALLOWED
            until(lambda: ask(port, path, own) == 200)
            until(lambda: none_left(server))
        assert "flask_gsession" not in server.log, server.log
