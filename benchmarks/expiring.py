"""How long other clients wait while many expired sessions are swept into the journal.

``python -m benchmarks.expiring`` prints it; ``--store`` and ``--number`` choose the store and the
number of sessions. Another process keeps asking the server, and an idle server beside it: if both
are slow, the machine was busy. On SQLite it reads and writes a session of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from redis import Redis

from flask_gsession.journal.store import JournalingStore, Subject
from flask_gsession.processes import process
from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.testing import FakeClock, a_record
from tests.harness.servers import MongoServer, RedisServer, with_database

NUMBERS = {"redis": 1_000_000, "mongodb": 100_000, "sqlite": 100_000}
_MOST = 1_000_000  # events that are kept
_PAUSE = 0.001  # seconds between two questions


def expiring(store: str, number: int) -> str:
    """Describe the result in words."""
    with ExitStack() as stack:
        if store == "sqlite":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            url, idle = (f"sqlite:///{folder}/{name}.sqlite3" for name in ("one", "idle"))
        else:
            make: Any = RedisServer if store == "redis" else MongoServer
            url, idle = (stack.enter_context(make()).url for _ in range(2))
            if store == "mongodb":
                url = with_database(url, "bench")
        return _expiring(url, idle, number)


def _expiring(url: str, idle: str, number: int) -> str:
    process.serves = True  # or each call outside a request opens an SQLite file again
    clock = FakeClock()
    plain = open_store(url, StoreOptions(prefix="bench:", clock=clock, timeout=30))[0]
    assert plain.journal is not None
    store = JournalingStore(plain, plain.journal, _MOST, clock)
    store.use(lambda record: Subject("ada", "laptop"))
    began = time.perf_counter()
    for _ in range(number):
        store.create(a_record(clock))
    created = time.perf_counter() - began
    clock.advance(61)
    before, swept = _resident(), 0
    with asked(url) as slow, asked(idle) as slow_idle:
        began = time.perf_counter()
        while found := store.sweep():
            swept += found
        seconds = time.perf_counter() - began
    figures = store.journal.figures()
    more = max(0, _resident() - before)
    store.close()
    assert (swept, figures.due) == (number, 0), (swept, figures)
    return (
        f"{number:,} sessions, created in {created:.0f} s, expired; all were entered in "
        f"{seconds:.0f} s ({number / seconds:,.0f} a second), with {more:,} KiB more memory. "
        f"Another client waited {_told(slow)}; for an idle server {_told(slow_idle)}. "
        f"{figures.last - figures.first + 1:,} of {3 * number:,} events are kept."
    )


def _told(waits: list[float]) -> str:
    most = max(waits, default=0.0)
    over = sum(wait > 50 for wait in waits)
    typical = sorted(waits)[int(len(waits) * 0.999)] if waits else 0.0
    return f"at most {most:.0f} ms (99.9%: {typical:.1f} ms, {over} of {len(waits):,} over 50 ms)"


def _resident() -> int:
    """The memory of this process in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


@contextmanager
def asked(url: str) -> Iterator[list[float]]:
    """Another process asks the server at ``url`` all the time; how long it waited, in ms."""
    waits: list[float] = []
    command = [sys.executable, "-m", "benchmarks.expiring", "--ask", url]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    try:
        yield waits
    finally:
        waits += json.loads(child.communicate()[0])


def ask(url: str) -> None:
    """Ask until the input ends."""
    import threading

    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    process.serves = True
    question, waits = _question(url), []
    question()
    print("ready", flush=True)
    while not over.is_set():
        began = time.perf_counter()
        question()
        waits.append(round((time.perf_counter() - began) * 1000, 2))
        time.sleep(_PAUSE)
    print(json.dumps(waits))


def _question(url: str) -> Callable[[], object]:
    if url.startswith("redis"):
        return Redis.from_url(url).ping
    if url.startswith("mongodb"):
        database = MongoClient[dict[str, Any]](url)["asked"]
        return lambda: database.command("ping")
    store = open_store(url, StoreOptions(prefix="asked:", timeout=30))[0]
    assert store.journal is not None
    store.journal.begin(_MOST)  # otherwise it would remove expired records
    return _of_a_session(store)


def _of_a_session(store: Store) -> Callable[[], object]:
    record = a_record(time.time, idle=3600)
    store.create(record)

    def question() -> None:
        nonlocal record
        old = store.load(record.key)
        assert old is not None
        record = old._replace(version=old.version + 1)
        store.save(record, old.version)

    return question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", nargs="+", choices=NUMBERS, default=[*NUMBERS])
    parser.add_argument("--number", type=int, help="of sessions; a million on Redis, else 100,000")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        ask(options.ask)
        return
    for store in options.store:
        print(f"{store}: {expiring(store, options.number or NUMBERS[store])}", flush=True)


if __name__ == "__main__":
    main()
