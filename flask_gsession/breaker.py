"""A circuit breaker: a store that costs every call its time is left alone for a moment.

Loads have a circuit and writes have one, in each process: a store that answers the ones and hangs
at the others is asked for what it can do.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from .errors import StoreError, StoreUnavailable
from .events import CircuitClosed, CircuitOpened, Events, logger
from .processes import process
from .stores.base import Clock, Store, pass_on

_LOADS = ("load", "read_frame")
_WRITES = (
    *("create", "save", "renew", "replace", "delete", "pop"),
    *("acquire", "extend", "release"),
    *("write_frame", "renew_blobs", "discard_blobs"),
)
_SLOW = 0.05  # seconds; what fails faster does no harm
_JITTER = 0.1  # of the pause, either way


def guarded(store: Store, failures: int, pause: float, timeout: float, events: Events) -> Store:
    """``store``, whose calls fail at once while its circuit is open.

    It opens after ``failures`` slow failures in a row; ``timeout`` is what a call may take.
    """
    return cast(Store, _GuardedStore(store, failures, pause, timeout, events))


class _GuardedStore:
    """Has every method of the contract and of the capabilities that the store has."""

    def __init__(
        self, store: Store, failures: int, pause: float, timeout: float, events: Events
    ) -> None:
        self.circuits: list[Circuit] = []
        for operations, names in (("loads", _LOADS), ("writes", _WRITES)):
            circuit = Circuit(operations, failures, pause, timeout, events)
            self.circuits.append(circuit)
            for name in filter(lambda name: hasattr(store, name), names):
                setattr(self, name, circuit.guard(store, name))
        pass_on(self, store)


class Circuit:
    """Closed while a store answers, open while it does not.

    Open, it refuses every call but one per ``pause``, the probe. An answer closes it, also one
    that says no; so does a fast failure. A failure in contention proves nothing either way.
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
        self._pause = pause
        self._slow = min(_SLOW, timeout / 4)
        self._probe_time = 2 * timeout + pause  # after which a probe is given up
        self._events = events
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        # Also in a forked process: a parent's thread may have held the lock, or been the probe.
        self._lock = threading.Lock()
        self._well = True  # the only thing that a call looks at, as long as it is
        self._failures = 0
        self._cause = ""
        self._open_since: float | None = None
        self._ask_at = 0.0
        self._answered_at = -math.inf

    def guard(self, store: object, name: str) -> Callable[..., Any]:
        """The method ``name`` of ``store``, within this circuit."""

        def call(*arguments: Any, **named: Any) -> Any:
            if not self._well:
                return self._call_warily(partial(getattr(store, name), *arguments, **named))
            start = self.clock()
            try:
                return getattr(store, name)(*arguments, **named)
            except StoreUnavailable as error:
                self._failed(error, start)
                raise

        return call

    def _call_warily(self, function: Callable[[], Any]) -> Any:
        process.notice()
        start, probe = self._admit()
        try:
            answer = function()
        except StoreUnavailable as error:
            self._failed(error, start, probe=probe)
            raise
        except StoreError:
            self._answered()
            raise
        self._answered()
        return answer

    def _admit(self) -> tuple[float, bool]:
        """When this call begins, and whether it is the probe. Raises while the circuit is open."""
        with self._lock:
            now = self.clock()
            if self._open_since is None:
                return now, False
            if now >= self._ask_at:
                # Nobody else until the probe is over; but for ever would be too long, should an
                # interrupt strike its thread right here.
                self._ask_at = now + self._probe_time
                return now, True
            wait, since, cause = self._ask_at - now, now - self._open_since, self._cause
        raise StoreUnavailable(
            f"not asked: {self._operations} have failed for {since:.1f} s, the last one with: "
            f"{cause}",
            retry_after=max(1, math.ceil(min(wait, self._pause))),
            asked=False,
        )

    def _failed(self, error: StoreUnavailable, start: float, *, probe: bool = False) -> None:
        process.notice()
        opened = False
        with self._lock:
            now = self.clock()
            if probe:
                self._ask_at = now + self._pause * random.uniform(1 - _JITTER, 1 + _JITTER)
            if error.contention or start < self._answered_at:
                return
            slow = now - start >= self._slow
            if slow:
                self._well = False
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
            self._well = True
        if since is not None:
            logger.warning("The session store answers %s again", self._operations)
            self._events.emit(CircuitClosed, self._operations, now - since)
