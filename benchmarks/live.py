"""How fast a live hint arrives, and how much memory an idle stream takes.

python -m benchmarks.live prints it.
"""

from __future__ import annotations

import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from pymongo import MongoClient

from tests.harness.gunicorn import Gunicorn
from tests.harness.servers import mongo_server, redis_server, with_database

STREAMS = 200
HINTS = 40
WORKERS = {
    "gthread": ("--worker-class", "gthread", "--threads", str(2 * STREAMS + 10)),
    "gevent": ("--worker-class", "gevent", "--worker-connections", str(3 * STREAMS)),
}
LIMIT_KB = 100
LIMIT_MS = {"redis": 50, "mongodb": 50, "sqlite": 100}


class HintTimes(NamedTuple):
    """Milliseconds from the end of a request that writes until a stream of any worker has it.

    0: it came before the response.
    """

    store: str
    worker: str
    median: float
    p90: float


class StreamMemory(NamedTuple):
    """Kilobytes of resident memory for each idle stream, each of a session of its own."""

    worker: str
    kilobytes: float


@contextmanager
def serving(folder: Path, store: str, worker: str, workers: int) -> Iterator[Gunicorn]:
    """The application of tests/harness/workers_app.py."""
    environment = {"WORKERS_STORE": store, "WORKERS_PREFIX": f"bench-{secrets.token_hex(4)}:"}
    with Gunicorn(folder, *WORKERS[worker], workers=workers, environment=environment) as server:
        yield server


def open_stream(port: int, cookie: str) -> socket.socket:
    """A stream whose first event has come."""
    client = socket.create_connection(("127.0.0.1", port), timeout=30)
    client.sendall(
        b"GET /live/stream HTTP/1.1\r\nHost: localhost\r\nCookie: session=%b\r\n\r\n"
        % cookie.encode()
    )
    received = b""
    while b"event: state" not in received:
        piece = client.recv(65_536)
        assert piece, received
        received += piece
    assert b" 200 OK" in received, received
    return client


def drain(stream: socket.socket) -> None:
    """Read the rest of earlier events."""
    stream.setblocking(False)
    with suppress(BlockingIOError):
        while stream.recv(65_536):
            pass
    stream.settimeout(30)


def hint_times(store: str, url: str, worker: str) -> HintTimes:
    """Writes and waits for the hint, again and again, at moments of no rhythm."""
    taken = []
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), url, worker, 2) as server,
    ):
        cookie = server.log_in("ada")
        with open_stream(server.port, cookie) as stream:
            time.sleep(2.5)  # until the listener is there
            for number in range(HINTS):
                time.sleep(0.05 + 0.037 * (number % 7))
                drain(stream)
                server.post("/count", cookie)
                written = time.perf_counter()
                while b"event: state" not in stream.recv(65_536):
                    pass
                taken.append(1000 * (time.perf_counter() - written))
    return HintTimes(store, worker, median(taken), quantiles(taken, n=10)[-1])


def stream_memory(url: str, worker: str) -> StreamMemory:
    """The growth of one worker's resident memory by idle streams."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), url, worker, 1) as server,
        ExitStack() as opened,
    ):
        (pid,) = server.pids()
        cookies = [server.log_in(str(number)) for number in range(STREAMS)]
        # Whatever is made once is there, and each thread of the worker was used.
        first = [open_stream(server.port, cookie) for cookie in cookies[:5]]
        for stream in first:
            stream.close()
        time.sleep(3)
        before = resident(pid)
        for cookie in cookies:
            opened.enter_context(open_stream(server.port, cookie))
        time.sleep(1)
        grown = resident(pid) - before
    return StreamMemory(worker, grown / STREAMS)


def resident(pid: int) -> float:
    """Kilobytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return float(status.partition("VmRSS:")[2].split()[0])


def _main(arguments: Sequence[str]) -> None:
    redis = redis_server().url
    for worker in WORKERS:
        found = stream_memory(redis, worker)
        verdict = "" if found.kilobytes < LIMIT_KB else "  NOT MET"
        print(
            f"{worker:8} {found.kilobytes:6.1f} KB for each of {STREAMS} idle streams, "
            f"limit {LIMIT_KB}{verdict}",
            flush=True,
        )
    name = f"bench_{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory() as folder:
        urls = {
            "redis": redis,
            "mongodb": with_database(mongo_server().url, name),
            "sqlite": f"sqlite:///{folder}/sessions.sqlite3",
        }
        for store, url in urls.items():
            for worker in WORKERS:
                times = hint_times(store, url, worker)
                verdict = "" if times.median <= LIMIT_MS[store] else "  NOT MET"
                print(
                    f"{store:20} {worker:8} a hint after {times.median:6.1f} ms "
                    f"(90 %: {times.p90:.1f}), limit {LIMIT_MS[store]}{verdict}",
                    flush=True,
                )
    with MongoClient(mongo_server().url) as client:
        client.drop_database(name)


if __name__ == "__main__":
    _main(sys.argv[1:])
