"""A clock for tests."""

from __future__ import annotations

import time


class FakeClock:
    """A clock that only moves when you call ``advance``: ``Session(app, clock=FakeClock())``."""

    def __init__(self, start: float | None = None) -> None:
        self.now = time.time() if start is None else start

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        self.now += seconds
