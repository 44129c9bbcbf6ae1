"""The metrics of the journal, updated at the end of a request, at most every 30 seconds."""

from __future__ import annotations

import time
from contextlib import suppress

from ..errors import StoreUnavailable
from ..stores.journals import Journal
from .metrics_figures import Figures

_INTERVAL = 30.0  # seconds between two updates in a process


class JournalWatch:
    """Updates the counts of events, of unswept expired sessions, and of each consumer's backlog."""

    def __init__(self, figures: Figures, journal: Journal, session: str) -> None:
        self._journal = journal
        kept, due, self._behind = figures.journal
        self._kept, self._due = kept.labels(session), due.labels(session)
        self._look_at = 0.0

    def observe(self, error: BaseException | None) -> None:
        """Called at the end of a request."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _INTERVAL
        with suppress(StoreUnavailable):
            figures = self._journal.figures()
            self._kept.set(figures.last - figures.first + 1 if figures.last else 0)
            self._due.set(figures.due)
            for name, number in figures.consumers.items():
                self._behind.labels(name).set(max(0, figures.last - number))
