"""Requests per second over HTTP: a read from the near cache beside a view without a session.

python -m benchmarks.requests_per_second prints it. All gunicorn workers share one core, and the
client, which only sends bytes and waits for bytes, has another. So the workers are always busy, the
client isn't part of the figure, and the two kinds of requests take turns of a few milliseconds.

Beside the rate stands the processor time of the workers for one request, listener included. It
doesn't count while another program has the core, so on a busy machine trust its ratio.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import Spread, ratios
from tests.harness.gunicorn import GTHREAD, Gunicorn
from tests.harness.servers import redis_server

KINDS = {"sync": (), "gthread": GTHREAD}
WORKERS, CLIENTS, EACH, ROUNDS, WARM = 2, 4, 25, 60, 10
BOUND = 1.0  # seconds
WITHOUT, CACHED, UNCACHED = "without a session", "from the near cache", "from Redis"
LEAST = 0.85


class Figures(NamedTuple):
    """The requests per second of each round, and the workers' microseconds per request."""

    rates: list[float]
    microseconds: list[float]


def ask(port: int, path: str, cookie: str, keep_alive: bool) -> float:
    """Requests per second of a few clients, each of which waits for its answer."""
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: session={cookie}\r\n"
    request = (head + ("\r\n" if keep_alive else "Connection: close\r\n\r\n")).encode()

    def send(client: socket.socket | None) -> socket.socket:
        if client is None:
            client = socket.create_connection(("127.0.0.1", port))
        client.sendall(request)
        return client

    began = time.perf_counter()
    clients = [send(None) for _ in range(CLIENTS)]
    for turn in range(EACH):
        for number, client in enumerate(clients):
            answer = client.recv(65_536)
            while not answer.endswith(b"}\n"):
                piece = client.recv(65_536)
                assert piece, answer
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200"), answer
            if not keep_alive:
                client.close()
            if turn < EACH - 1:
                clients[number] = send(client if keep_alive else None)
    taken = time.perf_counter() - began
    for client in clients:
        client.close()
    return CLIENTS * EACH / taken


def processor_time(pids: Sequence[int]) -> float:
    """Microseconds that these processes have run, in all threads."""
    return sum(
        int(task.read_text().split()[0]) / 1000
        for pid in pids
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat")
    )


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Run on one core, as processes do that are started here."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(kind: str) -> dict[str, Figures]:
    """The figures of each kind of request, which take turns."""
    url, options = redis_server().url, KINDS[kind]
    first, *_, last = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as near, tempfile.TemporaryDirectory() as plain:
        environment = {"WORKERS_STORE": url, "WORKERS_PREFIX": "bench-rps:"}
        with on_core(last):
            cached = Gunicorn(
                Path(near),
                *options,
                workers=WORKERS,
                environment=environment | {"WORKERS_NEAR": str(BOUND)},
            )
            uncached = Gunicorn(Path(plain), *options, workers=WORKERS, environment=environment)
            with cached, uncached, on_core(first):
                cookie = cached.log_in("ada")
                turns: dict[str, tuple[Gunicorn, str]] = {
                    WITHOUT: (cached, "/plain"),
                    CACHED: (cached, "/whoami"),
                    UNCACHED: (uncached, "/whoami"),
                }
                found = {name: Figures([], []) for name in turns}
                names = list(turns)
                for number in range(WARM + ROUNDS):  # the caches fill
                    start = number % len(names)
                    for name in names[start:] + names[:start]:
                        server, path = turns[name]
                        pids = server.pids()
                        before = processor_time(pids)
                        rate = ask(server.port, path, cookie, kind != "sync")
                        spent = processor_time(pids) - before
                        if number >= WARM:
                            found[name].rates.append(rate)
                            found[name].microseconds.append(spent / (CLIENTS * EACH))
    return found


def _main() -> None:
    def show(of: Spread) -> str:
        return f"{of.median:.2f} ({of.q1:.2f} to {of.q3:.2f})"

    for kind in KINDS:
        found = measure(kind)
        for name, each in found.items():
            rate, spent = Spread.of(each.rates), Spread.of(each.microseconds)
            print(f"{kind:8} {name:20} {rate.median:5.0f}/s, {spent.median:4.0f} us of processor")
        without = found[WITHOUT]
        for name in (CACHED, UNCACHED):
            by_rate = Spread.of(ratios(found[name].rates, without.rates))
            by_time = Spread.of(ratios(without.microseconds, found[name].microseconds))
            verdict = "" if name == UNCACHED else f", limit {LEAST}"
            if name == CACHED and by_time.median < LEAST:
                verdict += "  NOT MET"
            print(
                f"{kind:8} {name:20} {show(by_rate)} of the rate without a session, "
                f"{show(by_time)} by processor time{verdict}",
                flush=True,
            )


if __name__ == "__main__":
    _main()
