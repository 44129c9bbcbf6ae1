"""Tracks running writes, and writes that were cancelled before they began.

A client that is interrupted, or runs out of time, doesn't know the outcome of its write, which may
even be applied later. So the client has the write settled before it reads.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from ..errors import StoreUnavailable

_MOST = 100_000  # cancelled versions to remember


class Writes:
    """Identifies each write by its random version."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._running: Counter[int] = Counter()
        self._cancelled: dict[int, None] = {}  # oldest first

    @contextmanager
    def of(self, version: int) -> Iterator[None]:
        """Run a write in the block. Raises ``StoreUnavailable`` if it was cancelled."""
        with self._turn:
            if version in self._cancelled:
                raise StoreUnavailable("this write was cancelled", contention=True)
            self._running[version] += 1
        try:
            yield
        finally:
            with self._turn:
                self._running[version] -= 1
                if not self._running[version]:
                    del self._running[version]
                    self._turn.notify_all()

    def settle(self, versions: Collection[int], seconds: float) -> bool:
        """Cancel these writes, and wait for running ones. Returns whether all ended in time."""
        with self._turn:
            self._cancelled.update(dict.fromkeys(versions))
            while len(self._cancelled) > _MOST:
                del self._cancelled[next(iter(self._cancelled))]
            return self._turn.wait_for(lambda: self._running.keys().isdisjoint(versions), seconds)
