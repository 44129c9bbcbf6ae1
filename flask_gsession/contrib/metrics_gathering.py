"""Figures of several workers, gathered in memory and put into their files ten times a second.

With several workers prometheus-client keeps each figure in a file that is mapped into memory. To
change one costs a microsecond, and a store call changes three. So what is counted goes into a
queue, and a thread adds the queue up.
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

_EVERY = 0.1  # seconds
_PATIENCE = 1.0  # seconds, after which a thread is not waited for any more

#: Puts amounts into the figures.
Put = Callable[[Sequence[float]], object]


def counted(counter: Counter) -> Put:
    """Adds amounts to a counter."""
    return lambda amounts: counter.inc(sum(amounts))


def observed(histogram: Histogram) -> Put:
    """As ``histogram.observe`` of each amount, with one change of each figure for all of them."""

    def put(amounts: Sequence[float]) -> None:
        bounds, buckets = histogram._upper_bounds, histogram._buckets
        histogram._sum.inc(sum(amounts))
        for index, number in Tally(bisect_left(bounds, amount) for amount in amounts).items():
            buckets[index].inc(number)

    return put


class Gathering:
    """What was counted and is in no file yet: of this process, for a tenth of a second.

    Nothing is lost or counted twice by threads, forks, or a process that ends in good order; one
    that is killed takes that tenth of a second with it.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Put, float]] = deque()  # whose ends threads may share
        self._begin()
        process.register(self._begin)
        at_fork(before=self._before_fork, after_in_parent=self._after_fork)
        atexit.register(self.flush)

    def _begin(self) -> None:
        """In a new process: what its parent gathered is for the parent to put away."""
        self._queue.clear()
        self._lock = threading.Lock()  # of who puts away; also that no file is written in a fork
        self._wanted = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._due = 0.0  # when to do more than to queue; 0: at the next amount
        self._failed = False

    def _before_fork(self) -> None:
        self._lock.acquire()

    def _after_fork(self) -> None:
        self._lock.release()

    def add(self, put: Put, amount: float, now: float | None = None) -> None:
        """Have ``put`` called with the amount, among others, soon. ``now``: by the same clock."""
        process.notice()
        self._queue.append((put, amount))
        if (perf_counter() if now is None else now) >= self._due:
            self._see_to_it()

    def flush(self) -> None:
        """Put away what was gathered until now. Never raises: it is only about figures."""
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
                        logger.warning("Figures for Prometheus are lost: %r", error)
                    self._failed = True

    def _see_to_it(self) -> None:
        first = not self._due
        self._due = perf_counter() + _PATIENCE
        if first and self._start():
            self._wanted.set()
        else:  # there are no threads here, or they do not run
            self._due = 0.0
            self.flush()

    def _start(self) -> bool:
        """Whether there is a thread now. It must not be halfway through a file in a fork in C."""
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
            pause.wait(_EVERY)
            wanted.clear()
            self._due = 0.0  # before, so that whatever comes after is not overlooked
            self.flush()
