"""Workers with near caches against a writer that knows which writes were acknowledged, and when.

::

    with Race(url, prefix, workers=3) as race:
        race.write(500)
        ...  # break something
        race.write(500)
    assert race.worst < race.bound

Each worker is a process that reads as fast as it can. For every record that it serves from its
cache, it looks up in shared memory when the next version of that record was acknowledged: a read
that began the bound or longer after that is a violation. `worst` is the longest such time, in
seconds. Saves and revocations are numbered: the payload of a record is its number.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from redis.crc import key_slot

from flask_gsession.errors import Gone, StoreError, StoreUnavailable
from flask_gsession.live.listener import now
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.base import Record, Store
from flask_gsession.stores.wrappers import Wrapper
from flask_gsession.stores.wrappers.near_cache import NearCache
from flask_gsession.testing.records import a_record
from tests.harness.topologies import until

BOUND = 0.2  # seconds
MOST = 60_000  # versions of one record
_FORK = multiprocessing.get_context("fork")

Break = Callable[[NearCache], None]


class Slow(Wrapper):
    """A store whose answers to loads take a while to arrive."""

    def load(self, key: str) -> Record | None:
        record = self.store.load(key)
        time.sleep(random.random() * 0.002)
        return record


class Worker:
    """The result of one worker, in shared memory."""

    def __init__(self) -> None:
        self.worst = _FORK.RawValue("d", 0)
        self.hits = _FORK.RawValue("q", 0)
        self.pid = _FORK.RawValue("q", 0)


class Race:
    """The writer, in this process, and the workers. A context manager: they run within it.

    :param writes_to: where the writer writes, if not at `url`.
    :param broken: breaks the cache of each worker on purpose.
    :param forks: each worker forks another one while it runs.
    """

    def __init__(
        self,
        url: str,
        prefix: str,
        *,
        workers: int = 3,
        records: int = 20,
        bound: float = BOUND,
        writes_to: str | None = None,
        broken: Break | None = None,
        forks: bool = False,
        timeout: float = 5.0,
    ) -> None:
        self.url, self.bound, self._broken, self._forks = url, bound, broken, forks
        self._options = StoreOptions(prefix=prefix, timeout=timeout)
        self._store, _ = open_store(writes_to or url, self._options)
        self._records = [a_record(time.time, payload=b"0") for _ in range(records)]
        self._acknowledged = [_FORK.RawArray("d", MOST) for _ in self._records]
        self._over = _FORK.RawValue("b", 0)
        self.workers = [Worker() for _ in range(workers * (2 if forks else 1))]
        self._processes: list[Any] = []

    @property
    def worst(self) -> float:
        """The longest time after its end was acknowledged at which a record was served."""
        return max(worker.worst.value for worker in self.workers)

    @property
    def hits(self) -> int:
        """How many reads were served from the caches."""
        return sum(worker.hits.value for worker in self.workers)

    def __enter__(self) -> Self:
        for record in self._records:
            self._store.create(record)
        count = len(self.workers) // (2 if self._forks else 1)
        for number in range(count):
            process = _FORK.Process(target=self._work, args=(number,), daemon=True)
            process.start()
            self._processes.append(process)
        self.wait_for_hits(20)
        return self

    def wait_for_hits(self, more: int) -> None:
        """Return when each worker has served that many reads more from its cache."""
        before = [worker.hits.value for worker in self.workers]

        def done() -> bool:
            pairs = zip(self.workers, before, strict=True)
            return all(worker.hits.value >= hits + more for worker, hits in pairs)

        until(done, "reads from the caches")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.value = 1
        for process in self._processes:
            process.join(20)
            process.kill()
        self._store.close()
        assert kind is not None or all(process.exitcode == 0 for process in self._processes)

    def slots(self) -> list[int]:
        """The slots of the records in a Redis Cluster."""
        prefix = self._options.prefix
        return [key_slot(f"{prefix}{{{record.key}}}".encode()) for record in self._records]

    # The writer.

    def write(self, times: int) -> None:
        """Save and revoke at random, then wait for longer than the bound."""
        for _ in range(times):
            number = random.randrange(len(self._records))
            if random.random() < 0.3:
                self._revoke(number)
            else:
                self._save(number)
        self.rest()

    def rest(self) -> None:
        """Let the workers read for more than the bound, and nobody write."""
        time.sleep(1.5 * self.bound)

    def write_for(self, seconds: float) -> None:
        """Write in short bursts for about so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.write(40)

    def flushed(self) -> None:
        """All records were removed: make them again."""
        for number in range(len(self._records)):
            self._next(number)
            self._create(number)
        self.rest()

    def _save(self, number: int) -> None:
        old = self._records[number]
        new = self._successor(old)
        while True:
            with suppress(StoreUnavailable, Gone):
                self._store.save(new, old.version)
                break
            with suppress(StoreUnavailable):
                there = self._store.load(old.key)
                if there is None:
                    self._store.create(new)
                    break
                if there.version == new.version:
                    break
        self._records[number] = new
        self._acknowledge(number)

    def _revoke(self, number: int) -> None:
        while True:
            with suppress(StoreUnavailable):
                self._store.delete(self._records[number].key)
                break
        self._next(number)
        self._create(number)

    def _next(self, number: int) -> None:
        self._records[number] = self._successor(self._records[number])
        self._acknowledge(number)

    def _create(self, number: int) -> None:
        self._records[number] = new = self._successor(self._records[number])
        while True:
            with suppress(StoreUnavailable):
                self._store.create(new)
                break
        self._acknowledge(number)

    def _acknowledge(self, number: int) -> None:
        self._acknowledged[number][int(self._records[number].payload)] = now()

    def _successor(self, record: Record) -> Record:
        number = int(record.payload) + 1
        return record._replace(version=number, payload=b"%d" % number)

    # A worker.

    def _work(self, number: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        store, _ = open_store(self.url, self._options)
        cache = NearCache(Slow(store), self.bound, 10_000_000, time.time)
        if self._broken is not None:
            self._broken(cache)
        forked = 0
        worker = self.workers[number]
        worker.pid.value = os.getpid()
        while not self._over.value:
            self._read(cache, worker)
            if self._forks and not forked and worker.hits.value > 200:
                forked = os.fork()
                if not forked:
                    worker = self.workers[len(self.workers) // 2 + number]
                    worker.pid.value = forked = os.getpid()
        close(store)
        if self._forks and forked != os.getpid():
            os.waitpid(forked, 0)
        os._exit(0)

    def _read(self, cache: NearCache, worker: Worker) -> None:
        number = random.randrange(len(self._records))
        key = self._records[number].key
        for _ in range(20):
            began = now()
            record = cache.peek(key)
            if record is None:
                with suppress(StoreError):
                    cache.load_near(key)
                break
            worker.hits.value += 1
            ended = self._acknowledged[number][int(record.payload) + 1]
            if ended and began - ended > worker.worst.value:
                worker.worst.value = began - ended
        time.sleep(0.001)

    @contextmanager
    def stopped(self, number: int = 0) -> Iterator[None]:
        """Stop a worker (SIGSTOP) for the length of the block."""
        pid = self.workers[number].pid.value
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


def close(store: Store) -> None:
    """Close it, whatever state its server is in."""
    with suppress(StoreError):
        store.close()
