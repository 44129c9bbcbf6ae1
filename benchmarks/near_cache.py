"""The cost of a read from the near cache, compared with a read from Redis and a cookie.

python -m benchmarks.near_cache prints it.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import redis
from flask import Flask

from benchmarks.backends.on_redis import delete_prefix
from benchmarks.candidates import COOKIE, NONE, sessionless, with_session
from benchmarks.measure import Call, Effort, Spread, interleave, paired, ratios
from benchmarks.payloads import BROWSER_COOKIE_LIMIT, SIZES
from benchmarks.visitor import Visitor
from flask_gsession import Session

BOUND = 1.0  # seconds
DELAY = 0.0005  # seconds that a server is away
NEAR, LOOPBACK, AWAY = "near cache", "Redis on loopback", "Redis 0.5 ms away"
LIMITS = {LOOPBACK: 0.75, AWAY: 0.15, COOKIE: 1.0}
MOST_PINGS = 4  # of one process, for each bound
PREFIX = "bench-near:"


@dataclass(frozen=True)
class NearCost:
    """A read from the near cache beside another read, in microseconds beyond no session."""

    size: str
    beside: str
    us: Spread
    us_beside: Spread
    ratio: Spread


def near_cache(url: str, sizes: Sequence[str], effort: Effort) -> list[NearCost]:
    """Times the reads in turns, for sessions of each size; ``url`` is of a Redis."""
    return [cost for size in sizes for cost in _at_size(url, size, effort)]


def _at_size(url: str, size: str, effort: Effort) -> Iterator[NearCost]:
    length = SIZES[size]
    with ExitStack() as opened:
        port = opened.enter_context(_delayed(urlsplit(url).port or 6379))
        away = urlsplit(url)._replace(netloc=f"127.0.0.1:{port}").geturl()

        def on_redis(where: str, near: float) -> Visitor:
            def install(app: Flask) -> None:
                ext = Session(
                    app,
                    store=where,
                    key_prefix=PREFIX,
                    near_cache=near,
                    newcomers_per_minute=None,
                )
                opened.callback(ext.close, app)

            return with_session(length, install)

        visitors = {
            NONE: sessionless(length),
            NEAR: on_redis(url, BOUND),
            LOOPBACK: on_redis(url, 0),
            AWAY: on_redis(away, 0),
        }
        if length < 2 * BROWSER_COOKIE_LIMIT:
            cookie = with_session(length)
            if cookie.cookie_bytes <= BROWSER_COOKIE_LIMIT:
                visitors[COOKIE] = cookie
        calls = {name: visitor.prepare("/read") for name, visitor in visitors.items()}
        with redis.Redis.from_url(url) as client:
            opened.callback(delete_prefix, client, PREFIX)
            _warm(client, calls[NEAR])
            figures = interleave(calls, effort)
            opened.pop_all().close()
    mine = paired(figures, NEAR, minus=NONE)
    for name in visitors.keys() - {NONE, NEAR}:
        beside = paired(figures, name, minus=NONE)
        yield NearCost(
            size, name, Spread.of(mine), Spread.of(beside), Spread.of(ratios(mine, beside))
        )


def _warm(client: redis.Redis, read: Call) -> None:
    """Read until reads cost no command."""
    for _ in range(200):
        before = client.info("commandstats").get("cmdstat_get", {}).get("calls", 0)
        for _ in range(5):
            read()
        if client.info("commandstats").get("cmdstat_get", {}).get("calls", 0) == before:
            return
        time.sleep(0.01)
    raise RuntimeError("the near cache serves nothing")


def pings(url: str, bounds: int = 10) -> float:
    """How many pings a process sends to prove its cache fresh, in the time of one bound."""
    app = Flask("pings")
    app.secret_key = "a benchmark's secret key, of a sensible length"
    ext = Session(app, store=url, key_prefix=PREFIX, near_cache=BOUND)

    def sent() -> int:
        return int(client.info("commandstats").get("cmdstat_ping", {}).get("calls", 0))

    with redis.Redis.from_url(url) as client:
        app.extensions["gsession"][ext].repository.near.load_near("x")  # the listener starts
        time.sleep(BOUND)
        before = sent()
        time.sleep(bounds * BOUND)
        taken = sent() - before
        ext.close(app)
    return taken / bounds


@contextmanager
def _delayed(target: int) -> Iterator[int]:
    """A port in another process, whose answers come from the one at ``target``, later."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.near_cache", str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.communicate()  # it ends with its input


def _pass_on(source: socket.socket, sink: socket.socket, delay: float) -> None:
    with suppress(OSError):
        while piece := source.recv(1 << 16):
            if delay:
                time.sleep(delay)
            sink.sendall(piece)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _serve(target: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", target))
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for arguments in ((client, server, 0.0), (server, client, DELAY)):
                threading.Thread(target=_pass_on, args=arguments, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


def _main() -> None:
    from tests.harness.servers import redis_server

    url = redis_server().url
    found = pings(url)
    verdict = "" if found <= MOST_PINGS else "  NOT MET"
    print(f"{found:.1f} pings in {BOUND:g} s, which is the bound; limit {MOST_PINGS}{verdict}")
    for cost in near_cache(url, list(SIZES), Effort(15, 0.02, 1)):
        limit = LIMITS[cost.beside]
        verdict = "" if cost.ratio.median <= limit else "  NOT MET"
        print(
            f"{cost.size:>7} {cost.us.median:7.1f} us beside {cost.us_beside.median:7.1f} us of "
            f"{cost.beside:18} {cost.ratio.median:5.2f} "
            f"({cost.ratio.q1:.2f} to {cost.ratio.q3:.2f}), limit {limit}{verdict}"
        )


if __name__ == "__main__":
    _serve(int(sys.argv[1])) if len(sys.argv) > 1 else _main()
