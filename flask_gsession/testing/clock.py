"""A clock that tests turn by hand."""

from __future__ import annotations

import time


class FakeClock:
    """A clock that stands still until it is turned: ``Session(app, clock=FakeClock())``."""

    def __init__(self, start: float | None = None) -> None:
        self.now = time.time() if start is None else start

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Turn the clock forward."""
        self.now += seconds
