"""Renews the leases of the locks that this process holds, in one thread."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from ..errors import StoreUnavailable
from ..events import logger
from ..processes import process
from ..stores.interrupts import Condition
from ..stores.parts import Leases


class Renewable(Protocol):
    """A lock whose lease the thread renews."""

    def due(self) -> float:
        """When to call ``maintain`` next, by ``time.monotonic``."""

    def maintain(self) -> None:
        """Extend the lease and warn, if that is due."""


def release_lease(store: Leases, key: str, owner: str) -> bool:
    """Release a lease. Returns whether it was held until now, as far as we know."""
    try:
        return store.release(key, owner)
    except StoreUnavailable as error:
        logger.warning("A lock could not be released, and will expire by itself: %s", error)
        return True


class Renewer:
    """Extends the leases that this process holds, in one thread, while there are any.

    Holds only weak references, so the lock of a thread that died is not extended.
    """

    def __init__(self) -> None:
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self._locks: weakref.WeakSet[Renewable] = weakref.WeakSet()
        self._tasks: deque[Callable[[], object]] = deque()
        self._changed = Condition()
        self._running = False
        self._wakes_at = 0.0

    def add(self, lock: Renewable) -> None:
        """Start to maintain a lock."""
        process.notice()
        with self._changed:
            self._locks.add(lock)
            self._wake(lock.due())

    def discard(self, lock: Renewable) -> None:
        """Stop maintaining a lock."""
        process.notice()
        with self._changed:
            self._locks.discard(lock)

    def run(self, task: Callable[[], object]) -> None:
        """Run this once, soon. If no thread can start, it runs with the next one."""
        process.notice()
        with self._changed, suppress(RuntimeError):
            self._tasks.append(task)
            self._wake(0.0)

    def _wake(self, due: float) -> None:
        if not self._running:
            threading.Thread(target=self._work, name="gsession-locks", daemon=True).start()
            self._running = True
        elif due < self._wakes_at:
            self._changed.notify()

    def _work(self) -> None:
        while True:
            self._do_next()
            with self._changed:
                if not (self._locks or self._tasks):
                    self._running = False
                    return

    def _do_next(self) -> None:
        for task in self._next():
            try:
                task()
            except Exception:
                logger.exception("The background work for a lock failed")

    def _next(self) -> list[Callable[[], object]]:
        """Wait until something is due, and return it."""
        with self._changed:
            self._wakes_at = min((lock.due() for lock in self._locks), default=0.0)
            if not self._tasks:
                self._changed.wait(max(0.001, self._wakes_at - time.monotonic()))
            now = time.monotonic()
            tasks = [*self._tasks, *(lock.maintain for lock in self._locks if lock.due() <= now)]
            self._tasks.clear()
            return tasks


renewer = Renewer()
