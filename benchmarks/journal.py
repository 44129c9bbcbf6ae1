"""What the journal costs, and how many expired sessions a sweep enters.

``python -m benchmarks.journal`` times a create, a save and a logout with the journal on and off;
``--expire N`` lets N sessions expire and sweeps them, and prints the longest pause of the server,
as another connection sees it, and the memory that the sweep takes.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from redis import Redis

from flask_gsession.journal.store import JournalingStore, Subject
from flask_gsession.stores import Record, Store, StoreOptions, open_store
from flask_gsession.testing import FakeClock, a_record
from tests.harness.servers import MongoServer, RedisServer, with_database

_ROUNDS = 400
_MOST = 1_000_000


def opened(url: str, clock: FakeClock, prefix: str, *, on: bool) -> Store:
    store = open_store(url, StoreOptions(prefix=prefix, clock=clock, timeout=10))[0]
    if not on:
        return store
    assert store.journal is not None
    journaling = JournalingStore(store, store.journal, _MOST, clock)
    journaling.use(lambda record: Subject("ada", "laptop"))
    return journaling


def timed(action: Callable[[Any], object], things: list[Any]) -> float:
    """The median in microseconds."""
    times = []
    for thing in things:
        start = time.perf_counter()
        action(thing)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def costs(name: str, url: str, rounds: int) -> None:
    clock = FakeClock()
    figures = {}
    for on in (False, True):
        store = opened(url, clock, f"bench-{on}:", on=on)
        records = [a_record(clock, idle=3600) for _ in range(rounds)]
        create = timed(store.create, records)
        saved = [record._replace(version=record.version + 1) for record in records]
        save = timed(partial(_save, store), list(zip(saved, records, strict=True)))
        end = timed(partial(_end, store), saved)
        figures[on] = create, save, end
        store.close()
    for verb, off, with_it in zip(("create", "save", "logout"), *figures.values(), strict=True):
        print(f"{name:8} {verb:7} off {off:7.0f} us   on {with_it:7.0f} us   {with_it / off:.2f}x")


def _save(store: Store, pair: tuple[Record, Record]) -> None:
    store.save(pair[0], pair[1].version)


def _end(store: Store, record: Record) -> None:
    """As a logout does: by the version that the request loaded."""
    store.delete(record.key, record.version)


@contextmanager
def watched(port: int) -> Iterator[list[float]]:
    """The slowest answers to PING during the run, in milliseconds."""
    slowest, stop = [0.0], threading.Event()

    def ping() -> None:
        with Redis(port=port) as client:
            while not stop.is_set():
                start = time.perf_counter()
                client.ping()
                slowest.append((time.perf_counter() - start) * 1000)
                slowest[1:] = sorted(slowest[1:])[-3:]
                time.sleep(0.001)

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        yield slowest
    finally:
        stop.set()
        thread.join()


def expire(number: int) -> None:
    with RedisServer() as server:
        clock = FakeClock()
        store = opened(server.url, clock, "bench:", on=True)
        assert isinstance(store, JournalingStore)
        start = time.perf_counter()
        for _ in range(number):
            store.create(a_record(clock))
        print(f"{number} sessions created in {time.perf_counter() - start:.0f} s")
        clock.advance(61)
        with Redis.from_url(server.url) as client:
            client.config_set("slowlog-log-slower-than", 1000)
            client.slowlog_reset()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            start = time.perf_counter()
            with watched(server.port) as slowest:
                swept = 0
                while found := store.sweep():
                    swept += found
            seconds = time.perf_counter() - start
            more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            slow = max((entry["duration"] for entry in client.slowlog_get(128)), default=0)
            print(
                f"{swept} expired sessions entered in {seconds:.1f} s "
                f"({swept / seconds:.0f} a second); {more} KiB more memory; slowest PING beside "
                f"it {max(slowest):.1f} ms; slowest command {slow / 1000:.1f} ms; "
                f"{client.dbsize()} keys left, {store.journal.figures().due} due"
            )
        store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--expire", type=int, metavar="N", help="let N sessions expire in Redis")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    arguments = parser.parse_args()
    if arguments.expire:
        expire(arguments.expire)
        return
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        costs("SQLite", f"sqlite:///{folder}/sessions.sqlite3", arguments.rounds)
        costs("Redis", stack.enter_context(RedisServer()).url, arguments.rounds)
        mongo = stack.enter_context(MongoServer())
        costs("MongoDB", with_database(mongo.url, "bench"), arguments.rounds)


if __name__ == "__main__":
    main()
