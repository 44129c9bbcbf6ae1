"""Requests per second over HTTP: a read from the near cache beside a view without a session.

python -m benchmarks.requests_per_second prints it. Two gunicorn workers serve both in turns.
"""

from __future__ import annotations

import http.client
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from tests.harness.gunicorn import GTHREAD, Gunicorn
from tests.harness.servers import redis_server

KINDS = {"sync": (), "gthread": GTHREAD}
CLIENTS, EACH, ROUNDS = 4, 150, 15
WITHOUT, CACHED, UNCACHED = "/plain", "/whoami", "/whoami, no near cache"
LEAST = 0.85


def rate(server: Gunicorn, path: str, cookie: str) -> float:
    """Requests per second of a few clients, each on its own connection."""
    ready = threading.Barrier(CLIENTS + 1)

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        ready.wait()
        for _ in range(EACH):
            connection.request("GET", path, headers={"Cookie": f"session={cookie}"})
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, body
        connection.close()

    clients = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    ready.wait()
    began = time.perf_counter()
    for client in clients:
        client.join()
    return CLIENTS * EACH / (time.perf_counter() - began)


def _main() -> None:
    for kind, options in KINDS.items():
        with tempfile.TemporaryDirectory() as near, tempfile.TemporaryDirectory() as plain:
            environment = {"WORKERS_STORE": redis_server().url, "WORKERS_PREFIX": "bench-rps:"}
            with (
                Gunicorn(
                    Path(near), *options, workers=2, environment=environment | {"WORKERS_NEAR": "1"}
                ) as cached,
                Gunicorn(Path(plain), *options, workers=2, environment=environment) as uncached,
            ):
                cookie = cached.log_in("ada")
                rates: dict[str, list[float]] = {WITHOUT: [], CACHED: [], UNCACHED: []}
                for _ in range(ROUNDS + 1):
                    rates[WITHOUT].append(rate(cached, WITHOUT, cookie))
                    rates[CACHED].append(rate(cached, CACHED, cookie))
                    rates[UNCACHED].append(rate(uncached, CACHED, cookie))
        for each in rates.values():
            del each[0]  # the caches fill
        beside = [mine / other for mine, other in zip(rates[CACHED], rates[WITHOUT], strict=True)]
        verdict = "" if median(beside) >= LEAST else "  NOT MET"
        figures = ", ".join(f"{name} {median(each):.0f}/s" for name, each in rates.items())
        print(
            f"{kind:8} {figures}: {median(beside):.2f} of the view without a session, "
            f"limit {LEAST}{verdict}",
            flush=True,
        )


if __name__ == "__main__":
    _main()
