"""A clean-up of a million sessions: ``python -m tests.faults.cleaning``.

A real Redis is filled by pipes; ``flask gsession cleanup`` runs in a process of its own, and beside
it somebody asks the server all the time whether it answers.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from typing import NamedTuple

from redis import Redis

from flask_gsession.stores.base import Record, new_version
from flask_gsession.stores.redis.layout import pack
from tests.harness.servers import RedisServer

ENDLESS = 100  # of so many keys one has no expiry, as crashes of other programs leave it
LONGEST_STEP = 50.0  # milliseconds, that the server may be held up
MOST_MEMORY = 50.0  # MB, that the clean-up of many may take beyond that of none

_APP = """
import resource, sys
from flask import Flask
from flask_gsession import Session
from flask_gsession.cli import gsession
app = Flask("cleaning")
app.config["SESSION_STORE_TIMEOUT"] = 10
app.secret_key = "a key for tests"
Session(app, store=sys.argv[1])
result = app.test_cli_runner().invoke(gsession, ["cleanup", "--json"])
sys.stderr.write(result.stderr)
print(result.stdout, end="")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(result.exit_code)
"""


class Figures(NamedTuple):
    """The results of a clean-up, and its cost in milliseconds, seconds and MB."""

    found: int
    left: int
    seconds: float
    longest_command: float
    longest_ping: float
    memory: float
    commands: set[str]


def measure(sessions: int) -> Figures:
    """Fill a server with so many sessions, and clean it up."""
    server = RedisServer()
    server.start()
    try:
        with Redis.from_url(server.url, socket_timeout=30) as client:
            _, before = _clean(server.url)
            fill(client, sessions)
            client.config_set("slowlog-log-slower-than", 1000)
            client.slowlog_reset()
            client.config_resetstat()
            pings: list[float] = []
            over = threading.Event()
            pinger = threading.Thread(target=_ping, args=(server.url, over, pings))
            pinger.start()
            start = time.monotonic()
            try:
                found, after = _clean(server.url)
            finally:
                seconds = time.monotonic() - start
                over.set()
                pinger.join()
            slow = client.slowlog_get(128)
            commands = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
            left, _ = _clean(server.url, "--dry-run")
    finally:
        server.stop()
    longest = max((each["duration"] for each in slow), default=0) / 1000
    return Figures(found, left, seconds, longest, max(pings), after - before, commands)


def fill(client: Redis, sessions: int) -> None:
    """Store so many sessions, one in ``ENDLESS`` without an expiry."""
    now = int(time.time() * 1000)
    end = now + 86_400_000
    for start in range(0, sessions, 10_000):
        pipe = client.pipeline(transaction=False)
        for number in range(start, min(start + 10_000, sessions)):
            key = secrets.token_urlsafe(32)
            value = pack(Record(key, new_version(), now, end, end, b"x" * 100))
            endless = number % ENDLESS == 0
            pipe.set(f"gsession:{{{key}}}", value, pxat=None if endless else end)
        pipe.execute()


def _clean(url: str, *options: str) -> tuple[int, float]:
    """How many keys had no expiry, and the peak of memory in MB."""
    code = _APP.replace('"--json"', ", ".join(f'"{word}"' for word in ("--json", *options)))
    run = subprocess.run(
        [sys.executable, "-c", code, url], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(run.stderr)
    report, _, peak = run.stdout.rstrip().rpartition("\n")
    (row,) = json.loads(report)
    return row["found"].get("sessions without expiry", 0), int(peak) / 1024


def _ping(url: str, over: threading.Event, pings: list[float]) -> None:
    with Redis.from_url(url, socket_timeout=30) as client:
        while True:
            start = time.perf_counter()
            client.ping()
            pings.append((time.perf_counter() - start) * 1000)
            if over.wait(0.001):
                return


def problems(figures: Figures, sessions: int, longest_step: float = LONGEST_STEP) -> list[str]:
    """The broken promises."""
    found = []
    if (figures.found, figures.left) != (-(-sessions // ENDLESS), 0):
        found.append(f"of the keys without expiry {figures.found} were found, {figures.left} left")
    if figures.longest_command > longest_step:
        found.append(f"a command held the server up for {figures.longest_command:.1f} ms")
    if figures.memory > MOST_MEMORY:
        found.append(f"it took {figures.memory:.0f} MB")
    if "keys" in figures.commands:
        found.append("it said KEYS")
    return found


def main() -> int:
    """Runs and prints; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.cleaning", description=__doc__)
    parser.add_argument("--sessions", type=int, default=1_000_000)
    sessions = parser.parse_args().sessions
    figures = measure(sessions)
    print(
        f"clean-up of {sessions} sessions in {figures.seconds:.0f} s: {figures.found} without "
        f"expiry, longest command {figures.longest_command:.1f} ms, longest ping "
        f"{figures.longest_ping:.1f} ms, {figures.memory:.1f} MB more than without any; "
        f"commands: {', '.join(sorted(figures.commands))}"
    )
    found = problems(figures, sessions)
    for problem in found:
        print(f"BROKEN: {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
