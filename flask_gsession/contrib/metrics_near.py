"""The metrics of the near cache, updated at the end of each request."""

from __future__ import annotations

import time

from ..stores.parts import NearReads
from .metrics_figures import Figures

_RESULTS = ("hit", "miss", "bypass")
_INTERVAL = 1.0  # seconds between two updates of the age


class NearWatch:
    """Adds the reads of ``near`` since the last update to ``figures``.

    The cache counts its own reads, because a read takes about a microsecond, and a metric would
    take as long.
    """

    def __init__(self, figures: Figures, near: NearReads, session: str) -> None:
        self._near = near
        self._add = [figures.adding(figures.near.labels(result)) for result in _RESULTS]
        self._age = figures.near_age.labels(session)
        self._seen = [0, 0, 0]
        self._look_at = 0.0

    def observe(self, error: BaseException | None) -> None:
        """Called at the end of a request."""
        *counts, age = self._near.figures()
        for index, count in enumerate(counts):
            new = count - self._seen[index]
            if new:
                self._seen[index] = count
                self._add[index](new)
        now = time.monotonic()
        if now >= self._look_at and age is not None:
            self._look_at = now + _INTERVAL
            self._age.set(age)
