"""The writes that run now, and those that were given up before they began.

A client that is interrupted, or whose time is over, doesn't know what became of its write, which
may even be applied after the client has looked. So it has the write settled before it looks.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from ..errors import StoreUnavailable

_MOST = 100_000  # versions that are remembered as given up


class Writes:
    """Knows each write by its version, which is drawn at random."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._running: Counter[int] = Counter()
        self._given_up: dict[int, None] = {}  # in the order of their coming

    @contextmanager
    def of(self, version: int) -> Iterator[None]:
        """A write runs in the block. Raises ``StoreUnavailable`` if it was given up."""
        with self._turn:
            if version in self._given_up:
                raise StoreUnavailable("this write was given up", contention=True)
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
        """Let none of these begin from now on; whether all that ran have ended in time."""
        with self._turn:
            self._given_up.update(dict.fromkeys(versions))
            while len(self._given_up) > _MOST:
                del self._given_up[next(iter(self._given_up))]
            return self._turn.wait_for(lambda: self._running.keys().isdisjoint(versions), seconds)
