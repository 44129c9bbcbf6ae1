"""A circuit breaker: after too many failures, calls fail at once for a while.

Each process has one circuit for loads and one for writes, so a store that hangs on writes but
answers loads still serves loads.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ...errors import StoreError, StoreUnavailable
from ...events import CircuitClosed, CircuitOpened, Events, logger
from ...processes import process
from ..base import Clock, Record, Store
from ..support import time_left
from .wrapper import CallWrapper

_LOADS = ("load", "read_frame")
_SLOW = 0.05  # seconds; faster failures do no harm
_JITTER = 0.1  # of the pause, either way


class GuardedStore(CallWrapper):
    """``store``, whose calls fail at once while their circuit is open.

    A circuit opens after ``failures`` slow failures in a row. It lets a probe through every
    ``pause`` seconds. ``timeout``: the seconds that a call may take.
    """

    def __init__(
        self, store: Store, failures: int, pause: float, timeout: float, events: Events
    ) -> None:
        self.loads = Circuit("loads", failures, pause, timeout, events)
        self.writes = Circuit("writes", failures, pause, timeout, events)
        super().__init__(store, partial(_guarded, self.loads, self.writes))

    # Every request calls the next two: they are ``Circuit.call``, inlined.

    def load(self, key: str) -> Record | None:
        circuit = self.loads
        if not circuit.is_healthy:
            return circuit.call_or_probe(self.store.load, key)  # type: ignore[no-any-return]
        start = circuit.clock()
        try:
            return self.store.load(key)
        except StoreUnavailable as error:
            circuit.failed(error, start)
            raise

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        circuit = self.writes
        if shorten or not circuit.is_healthy:
            super().save(record, expected_version, shorten=shorten)
            return
        start = circuit.clock()
        try:
            self.store.save(record, expected_version)
        except StoreUnavailable as error:
            circuit.failed(error, start)
            raise


def _guarded(
    loads: Circuit, writes: Circuit, operation: str, method: Callable[..., Any], *arguments: Any
) -> Any:
    circuit = loads if operation in _LOADS else writes
    return circuit.call(method, *arguments)


class Circuit:
    """Closed while a store answers, open while it does not.

    An open circuit refuses every call but one per ``pause``, the probe. Any answer closes it, even
    a refusal; so does a fast failure. A failure in contention proves nothing either way.
    """

    def __init__(
        self,
        operations: str,
        failures: int,
        pause: float,
        timeout: float,
        events: Events,
        clock: Clock = time.monotonic,
    ) -> None:
        self.clock = clock
        self._operations = operations
        self._limit = failures
        self._timeout = timeout
        self._pause = pause
        self._slow = min(_SLOW, timeout / 4)
        self._probe_time = 2 * timeout + pause  # after which a probe is given up
        self._events = events
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        # In a forked process too: a parent's thread may have held the lock, or been the probe.
        self._lock = threading.Lock()
        self.is_healthy = True  # while this is true, a call checks nothing else
        self._failures = 0
        self._cause = ""
        self._open_since: float | None = None
        self._ask_at = 0.0
        self._answered_at = -math.inf

    def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``method`` within this circuit."""
        if not self.is_healthy:
            return self.call_or_probe(method, *arguments)
        start = self.clock()
        try:
            return method(*arguments)
        except StoreUnavailable as error:
            self.failed(error, start)
            raise

    def call_or_probe(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """As ``call``, after a failure: a call that is admitted may be the probe."""
        process.notice()
        start, probe = self._admit()
        try:
            answer = method(*arguments)
        except StoreUnavailable as error:
            self.failed(error, start, probe=probe)
            raise
        except StoreError:
            self._answered()
            raise
        self._answered()
        return answer

    def _admit(self) -> tuple[float, bool]:
        """Returns when this call begins, and whether it is the probe.

        Raises ``StoreUnavailable`` while the circuit is open.
        """
        with self._lock:
            now = self.clock()
            if self._open_since is None:
                return now, False
            if now >= self._ask_at:
                # No other probe until this one is over. The time limit is for a probe whose thread
                # is interrupted right here.
                self._ask_at = now + self._probe_time
                return now, True
            wait, since, cause = self._ask_at - now, now - self._open_since, self._cause
        raise StoreUnavailable(
            f"not asked: {self._operations} have failed for {since:.1f} s, the last one with: "
            f"{cause}",
            retry_after=max(1, math.ceil(min(wait, self._pause))),
            asked=False,
        )

    def failed(self, error: StoreUnavailable, start: float, *, probe: bool = False) -> None:
        """Count the failure of a call that began at ``start``."""
        process.notice()
        opened = False
        with self._lock:
            now = self.clock()
            if probe:
                self._ask_at = now + self._pause * random.uniform(1 - _JITTER, 1 + _JITTER)
            if error.contention or start < self._answered_at:
                return
            if time_left(self._timeout) < self._timeout / 2 and now - start < self._timeout / 2:
                return  # the caller's deadline was too short to tell
            slow = now - start >= self._slow
            if slow:
                self.is_healthy = False
                self._failures += 1
                self._cause = error.detail
                opened = self._open_since is None and self._failures >= self._limit
            if opened:
                self._open_since = now
                self._ask_at = now + self._pause * random.uniform(1 - _JITTER, 1 + _JITTER)
        if opened:
            logger.error(
                "The session store failed %d times in a row; until it answers, %s fail at once: %s",
                self._limit,
                self._operations,
                error.detail,
            )
            self._events.emit(CircuitOpened, self._operations, error.detail)
        elif probe and not slow:
            self._answered()

    def _answered(self) -> None:
        with self._lock:
            now = self.clock()
            since, self._open_since = self._open_since, None
            self._failures = 0
            self._answered_at = now
            self.is_healthy = True
        if since is not None:
            logger.warning("The session store answers %s again", self._operations)
            self._events.emit(CircuitClosed, self._operations, now - since)
