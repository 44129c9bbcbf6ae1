"""Collects a worker's metrics in memory, and writes them to its files ten times a second.

In multiprocess mode, prometheus-client keeps each metric in a memory-mapped file. A change takes a
microsecond, and a store call changes three. So changes go into a queue, and a thread applies them.
"""

from __future__ import annotations

import atexit
import threading
from bisect import bisect_left
from collections import Counter as Tally
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from time import perf_counter

from prometheus_client import Counter, Histogram

from ..events import logger
from ..processes import at_fork, is_before_fork, process, runs_threads

_INTERVAL = 0.1  # seconds
_MAX_DELAY = 1.0  # seconds after which a request no longer relies on the thread

#: Applies amounts to a metric.
Put = Callable[[Sequence[float]], object]


def counted(counter: Counter) -> Put:
    """Adds amounts to a counter."""
    return lambda amounts: counter.inc(sum(amounts))


def observed(histogram: Histogram) -> Put:
    """Like ``histogram.observe`` for each amount, but with one change per bucket."""

    def put(amounts: Sequence[float]) -> None:
        bounds, buckets = histogram._upper_bounds, histogram._buckets
        histogram._sum.inc(sum(amounts))
        for index, number in Tally(bisect_left(bounds, amount) for amount in amounts).items():
            buckets[index].inc(number)

    return put


class Gathering:
    """The changes of this process during the last tenth of a second, which aren't in its files yet.

    Threads, forks and a normal exit neither lose nor repeat a change. A killed process loses its
    last tenth of a second.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Put, float]] = deque()  # append and popleft are atomic
        self._begin()
        process.register(self._begin)
        at_fork(before=self._before_fork, after_in_parent=self._after_fork)
        atexit.register(self.flush)

    def _begin(self) -> None:
        """Start empty in a forked process: its parent writes the parent's changes."""
        self._queue.clear()
        self._lock = threading.Lock()  # held while writing, and during a fork
        self._wanted = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._due = 0.0  # when `add` must do more than append; 0: at the next call
        self._failed = False

    def _before_fork(self) -> None:
        self._lock.acquire()

    def _after_fork(self) -> None:
        self._lock.release()

    def add(self, put: Put, amount: float, now: float | None = None) -> None:
        """Call ``put`` with this and other amounts soon. ``now``: from ``perf_counter``."""
        process.notice()
        self._queue.append((put, amount))
        if (perf_counter() if now is None else now) >= self._due:
            self._schedule()

    def flush(self) -> None:
        """Write all changes now. Logs errors and never raises."""
        process.notice()
        with self._lock:
            found: defaultdict[Put, list[float]] = defaultdict(list)
            for _ in range(len(self._queue)):
                put, amount = self._queue.popleft()
                found[put].append(amount)
            for put, amounts in found.items():
                try:
                    put(amounts)
                except Exception as error:
                    if not self._failed:
                        logger.warning("Metrics for Prometheus are lost: %r", error)
                    self._failed = True

    def _schedule(self) -> None:
        first = not self._due
        self._due = perf_counter() + _MAX_DELAY
        if first and self._start():
            self._wanted.set()
        else:  # no thread, or it doesn't run
            self._due = 0.0
            self.flush()

    def _start(self) -> bool:
        """Start the thread unless it runs. Returns whether it runs.

        Before uWSGI forks, it must not run, since the fork could come in the middle of a write.
        """
        if is_before_fork() or not runs_threads():
            return False
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    thread = threading.Thread(
                        target=self._work, name="gsession-metrics", daemon=True
                    )
                    try:
                        thread.start()
                    except RuntimeError:
                        return False
                    self._thread = thread
        return True

    def _work(self) -> None:
        wanted, pause = self._wanted, threading.Event()
        while True:
            wanted.wait()
            pause.wait(_INTERVAL)
            wanted.clear()
            self._due = 0.0  # before the flush, so that no later change is missed
            self.flush()
